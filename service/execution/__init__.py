"""A loaded model at one input size: its measured batch plan, its graphs, what they must answer."""
