"""The tasks that ship with p2pflock.  Code below this package may be named by any task spec; other code only
by specs that the person at the keyboard trusts (learning/entrypoint.py)."""
