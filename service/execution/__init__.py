"""A loaded model at one input size: its measured batch plan, its graphs, the logits that they must give."""
