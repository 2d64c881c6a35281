"""A report on batches as one page, and its charts as files."""
