"""Weighted sums over causal paths: printed and calibrated bounds, rollout, the mean-field estimate, and their flow."""
