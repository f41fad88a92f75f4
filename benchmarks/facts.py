"""Ten prompts of about 300 tokens with a fact in the first sentence that the last words ask for."""

from __future__ import annotations

# (fact with the asked word in braces, the beginning of the answer)
FACTS = (
    ("The password of the observatory is {amber}.", "So the password of the observatory is"),
    ("Our ship sails on {Thursday}.", "Remember: our ship sails on"),
    ("The cat of the lighthouse keeper is called {Oliver}.", "The lighthouse keeper calls his cat"),
    ("The treasure lies under the {bridge}.", "After all these years the treasure still lies under the"),
    ("The new teacher comes from {Norway}.", "Everybody knows that the new teacher comes from"),
    ("Grandmother keeps her letters in the {kitchen}.", "If you look for grandmother's letters, go to the"),
    ("The winning number of the lottery is {seven}.", "And so the winning number of the lottery is"),
    ("The museum's stolen painting shows a {horse}.", "The painting that was stolen shows a"),
    ("Doctor Hale is allergic to {honey}.", "At dinner do not give Doctor Hale any"),
    ("The committee elected {Maria} as its president.", "The president whom the committee elected is"),
)
FILLER = (
    "In the morning the market filled with people who wanted bread, apples and news.",
    "A light rain had fallen during the night, and the stones of the square were still wet.",
    "Two boys chased each other between the stalls until a woman with a basket told them to stop.",
    "The baker counted his coins twice, because the first time he had been interrupted.",
    "Someone played an old song on a violin, a little too slowly, near the fountain.",
    "From the harbour came the sound of hammers, as the men repaired the roof of the storehouse.",
    "Nobody paid attention to the clock, which had stopped in the winter before.",
    "A farmer offered three hens for a pair of boots, and after a long talk he got them.",
    "Towards noon the clouds broke up, and the windows on the south side began to shine.",
    "The mayor crossed the square with a pile of papers and a worried face.",
    "He greeted the blacksmith, who asked him about the road to the mill.",
    "The road, said the mayor, would be mended as soon as there was money for it.",
    "In the afternoon the stalls were taken down one by one and loaded onto carts.",
    "Pigeons picked up what had been dropped, and a dog slept in the middle of it all.",
    "When the evening came, lamps were lit in the inn, and voices could be heard until late.",
    "The innkeeper told the story of the great flood, as he did every week.",
    "Some of his guests had heard it so often that they could have told it themselves.",
    "Later the wind turned to the north, and the shutters had to be closed.",
)
LENGTH = 300  # tokens, about


def fact_prompts(model: object) -> list[tuple[str, int]]:
    """(prompt, position of the asked word's first token) of each fact; the filler starts elsewhere in each."""
    from oversquash_lens.capture.tokens import text_ids

    prompts = []
    for i, (fact, question) in enumerate(FACTS):
        before, word = fact.split("{")[0], fact.split("{")[1].split("}")[0]
        sentences = [fact.replace("{", "").replace("}", "")]
        for k in range(len(FILLER)):
            longer = [*sentences, FILLER[(2 * i + k) % len(FILLER)]]
            if len(text_ids(model, " ".join([*longer, question]))) > LENGTH:
                break
            sentences = longer
        position = len(text_ids(model, before.rstrip()))
        prompt = " ".join([*sentences, question])
        first = text_ids(model, prompt)[position]
        assert first == text_ids(model, f" {word}")[0], (fact, position)
        prompts.append((prompt, position))
    return prompts
