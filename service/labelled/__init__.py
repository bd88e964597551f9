"""Labelled images, a folder for each class: how well a model does on them, and a new head that is fitted to them."""
