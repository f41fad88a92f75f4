"""Seven prompts whose truth we publish: six natural ones and one of uniformly random tokens."""

import torch

MEETING = (
    "The committee met on Tuesday to discuss the budget. Alice said that the school needed new books, while Bob "
    "argued that the roof should be repaired first. After a long debate they agreed to split the money between the "
    "two. The answer is"
)
PROMPTS = {
    "meeting": MEETING,
    "news": ". ".join(MEETING.split(". ")[:2]) + ".",
    "code": (
        "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n-1) + fibonacci(n-2)\n\n"
        "print(fibonacci(10))  # expected output:"
    ),
    "ones": "How many ones are in the following sequence? " + "1 " * 40 + "Answer:",
    "story": (
        "Once upon a time there was a little girl who lived in a village near the forest. Whenever she went out, the "
        "little girl wore a red riding cloak, so everyone in the village called her"
    ),
    "riddle": ("Let x be a positive integer such that x squared plus three x equals forty. Then x must be equal to"),
}


def random_tokens() -> torch.Tensor:
    """64 token ids of SmolLM2's vocabulary, uniformly random."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, 40000, (1, 64), generator=generator)


def seven_prompts() -> dict:
    return {**PROMPTS, "random": random_tokens()}
