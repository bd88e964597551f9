"""Tests of the pages: they are whole, they say what the code says, and their examples do what is shown."""
