"""The T5 of emoji_sd3: python experiments/openmoji/train_t5.py [--steps N]

A transformers.T5ForConditionalGeneration learns to fill gaps in captions (span corruption; Raffel et al., 2020, section
3.1.4), and has never seen an image. Its encoder, frozen, reads the prompts of emoji_sd3 beside the two CLIPs.
"""

import argparse

import numpy as np
import pytorch_lightning as pl
import torch
from rendered import ROOT, rendered
from text import PRINTABLE, SCENES
from torch.utils.data import IterableDataset
from training import loader, scheduled, trainer
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from unlearning.data.captioning import Content, caption, vocabulary

WIDTH = 448  # of its states: as wide as those of the two CLIPs side by side, which SD3 pads to it
LENGTH, GAPS = 32, 8  # tokens of a caption; gaps in it, at most
CORRUPTED, SPAN = 0.15, 2  # the share of tokens in gaps, and the mean length of a gap
IGNORED = -100  # cross_entropy's mark for padding


def word_tokenizer() -> T5Tokenizer:
    """T5's unigram tokenizer: words of the captions are whole tokens, any other word is spelt in letters."""
    whole = [(f"▁{word}", -1.0) for word in vocabulary()]
    return T5Tokenizer(
        vocab=[*((p, 0.0) for p in ("<pad>", "</s>", "<unk>")), ("▁", -10.0), *((c, -10.0) for c in PRINTABLE), *whole],
        extra_ids=GAPS, model_max_length=LENGTH,
    )  # fmt: skip


def build(words: T5Tokenizer) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=32, d_ff=320, num_layers=2, num_heads=5, dropout_rate=0.0,
        decoder_start_token_id=words.pad_token_id, pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id,
    ))  # fmt: skip


class Gapped(IterableDataset):
    """Endless batches of (ids of captions with gaps, ids of what is in the gaps)."""

    def __init__(self, contents: list[Content], words: T5Tokenizer, batch: int):
        self.contents, self.words, self.batch = contents, words, batch
        self.marks = words.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(GAPS)])

    def __iter__(self):
        rng = np.random.default_rng(torch.initial_seed() % 2**63)
        while True:
            pairs = [self._gapped(rng) for _ in range(self.batch)]
            inputs, labels = (
                torch.nn.utils.rnn.pad_sequence(map(torch.tensor, part), batch_first=True, padding_value=filler)
                for part, filler in zip(zip(*pairs, strict=True), (self.words.pad_token_id, IGNORED), strict=True)
            )
            yield inputs, labels

    def _gapped(self, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        text = caption(self.contents[rng.integers(len(self.contents))], rng)
        *ids, end = self.words(text, truncation=True, max_length=LENGTH).input_ids
        kept, gaps, i = [], [], 0
        while i < len(ids):
            used = sum(token in self.marks for token in gaps)
            if rng.random() < CORRUPTED / SPAN and used < GAPS:
                span = min(len(ids) - i, 1 + rng.poisson(SPAN - 1))
                kept.append(self.marks[used])
                gaps += [self.marks[used], *ids[i : i + span]]
                i += span
            else:
                kept.append(ids[i])
                i += 1
        return [*kept, end], [*gaps, end]


class Filling(pl.LightningModule):
    def __init__(self, t5: T5ForConditionalGeneration, steps: int, lr: float = 2e-3):
        super().__init__()
        self.t5, self.steps, self.lr = t5, steps, lr

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = self.t5(input_ids=inputs, attention_mask=inputs != self.t5.config.pad_token_id, labels=labels).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        return scheduled(optimizer, self, warmup=200, decay=0.9)


def main(steps: int, batch: int, images: int) -> None:
    pl.seed_everything(5)
    words = word_tokenizer()
    module = Filling(build(words), steps)
    _, contents = rendered("train", images, scenes=SCENES)
    data = loader(Gapped(contents, words, batch))
    trainer("t5", steps).fit(module, data, ckpt_path="last")
    module.t5.eval().save_pretrained(ROOT / "t5")
    words.save_pretrained(ROOT / "t5")
    print("saved", ROOT / "t5")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=60_000)
    main(**vars(parser.parse_args()))
