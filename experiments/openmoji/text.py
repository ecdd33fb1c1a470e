"""The tokenizer of the embedded models' CLIPs, and what their training reads: images with random captions."""

import json

import numpy as np
import torch
from rendered import ROOT, WEIGHTS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import IterableDataset
from transformers import CLIPTokenizer

from unlearning.data.captioning import Content, caption, vocabulary

LENGTH = 77  # tokens of a prompt, as in Stable Diffusion
SCENES = 0.35  # the share of images with several objects
PRINTABLE = [chr(i) for i in range(33, 127) if not chr(i).isupper()]


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding, in which words of the captions are whole tokens; other words are spelt in letters.

    It is made once and shipped, because pairs of equal frequency are merged in a random order.
    """
    shipped, folder = WEIGHTS / "emoji_unet" / "tokenizer", ROOT / f"tokenizer-{LENGTH}"
    if made_before := next((place for place in (shipped, folder) if place.exists()), None):
        return CLIPTokenizer.from_pretrained(made_before)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(vocabulary(), trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False))  # fmt: skip
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [*PRINTABLE, *(c + "</w>" for c in PRINTABLE), *(a + b for a, b in merges)]
    vocab = {p: i for i, p in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    made = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    made.save_pretrained(folder.with_suffix(".part"))
    folder.with_suffix(".part").rename(folder)
    return made


class Captioned(IterableDataset):
    """Endless batches of (images or latents, token ids) with a new caption each time.

    Args:
        images: (N, ...), memory-mapped or in memory.
        contents: What each of them shows.
        dropped: The fraction of captions that are replaced by "", for classifier-free guidance.
        padding: "longest" pads the captions of a batch to the longest of them, "max_length" to LENGTH tokens.
    """

    def __init__(
        self,
        images: np.ndarray | torch.Tensor,
        contents: list[Content],
        tokens: CLIPTokenizer,
        batch: int,
        dropped: float = 0.0,
        padding: str = "longest",
    ):
        self.images, self.contents, self.tokens, self.batch = images, contents, tokens, batch
        self.dropped, self.padding = dropped, padding

    def __iter__(self):
        rng = np.random.default_rng(torch.initial_seed() % 2**63)
        while True:
            rows = np.sort(rng.choice(len(self.contents), self.batch, replace=False))
            texts = ["" if rng.random() < self.dropped else caption(self.contents[i], rng) for i in rows]
            ids = self.tokens(texts, padding=self.padding, max_length=LENGTH, truncation=True, return_tensors="pt")
            yield torch.as_tensor(self.images[rows]), ids.input_ids
