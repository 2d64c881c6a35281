"""What each loader accepts, as rules that were read from its source or tried. A module for each kind of loader."""
