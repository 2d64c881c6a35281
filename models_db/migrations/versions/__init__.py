"""One file per migration, numbered with four digits in the order in which they run.

``oldest_code`` is the oldest schema whose code works with what the migration leaves: the one before it, or an older
one, for new tables, indexes and nullable columns alone; the migration itself for anything else. A process of an older
version goes on beside the first kind, and stops at the second.
"""
