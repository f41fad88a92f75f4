"""The paper's experiments: its prompts, tasks, synthetic set-ups and every figure."""
