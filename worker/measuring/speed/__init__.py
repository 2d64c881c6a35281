"""How fast a model runs, what memory and energy it takes."""
