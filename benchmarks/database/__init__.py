"""How long qbatch's commands and the scheduler's transactions take on a database with a long history."""
