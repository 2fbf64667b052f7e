"""What a training step costs: seconds by phase beside the machine's peaks, and how they grow with a size."""
