"""The queues in front of the instances: dynamic batching, deadlines, cancellation."""
