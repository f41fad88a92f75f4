"""What the README's figures are made by; run each as `python -m benchmarks.NAME` from the repository's root."""
