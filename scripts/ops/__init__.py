"""What runs a deployment: weights, GPU code, keeper, probes, report."""
