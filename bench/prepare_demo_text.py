"""Turn the corpus and Python's standard library into tokens, for `train_demo_model.py`.

    prepare_demo_text.py --corpus DIR --work DIR

writes `tokenizer.json` and, for each domain, `<domain>.train.npy` and `<domain>.heldout.npy`.
"""

import argparse
import hashlib
import json
import lzma
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
# GPT-4's pattern, but digits stay single: 4096 entries are too few to spend on numbers
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One kind of text: its file and its part of the tokenizer's sample."""

    name: str
    file: str | None  # None: the Python standard library of this machine
    tokenizer_bytes: int


DOMAINS = (
    Domain(name="books", file="books_en.jsonl.xz", tokenizer_bytes=12_000_000),
    Domain(name="tech_docs", file="tech_docs_en.jsonl.xz", tokenizer_bytes=4_000_000),
    Domain(name="code", file=None, tokenizer_bytes=3_000_000),
    Domain(name="math", file="math_gsm8k_train.jsonl.xz", tokenizer_bytes=1_500_000),
    Domain(name="drama", file="drama_tinyshakespeare.jsonl.xz", tokenizer_bytes=1_000_000),
    Domain(name="multilingual", file="multilingual.jsonl.xz", tokenizer_bytes=2_000_000),
)


def read_documents(domain: Domain, corpus: Path) -> list[str]:
    """Return the domain's documents; math ones as chat turns, the one long drama in pieces."""
    if domain.file is None:
        return read_standard_library()
    path = corpus / domain.file
    if not path.is_file():
        raise SystemExit(f"{path} is not there; give the corpus folder with --corpus DIR")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        texts = [str(json.loads(line)["text"]) for line in lines]
    if domain.name == "math":
        return [as_chat(text) for text in texts]
    if domain.name == "drama":
        speeches = texts[0].split("\n\n")
        return ["\n\n".join(speeches[i : i + 30]) for i in range(0, len(speeches), 30)]
    return texts


def read_standard_library() -> list[str]:
    """Return the sources of this Python's standard library, but tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "idle_test", "lib2to3", "__pycache__", "encodings"}
    paths = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def as_chat(text: str) -> str:
    """Turn "Question: ... Answer: ..." into a user turn and an assistant turn."""
    question, answer = text.removeprefix("Question: ").split("\nAnswer: ", 1)
    return f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"


def is_held_out(text: str) -> bool:
    """Say whether a document is kept for the loss table: 2%, by its hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") < 0.02 * 2**32


def train_tokenizer(documents: dict[str, list[str]], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on a balanced sample of the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def sample() -> Iterator[str]:
        for domain in DOMAINS:
            order = np.random.default_rng(0).permutation(len(documents[domain.name]))
            left = domain.tokenizer_bytes
            for i in order:
                if left <= 0:
                    break
                text = documents[domain.name][i]
                for token in SPECIAL_TOKENS:
                    text = text.replace(token, "")
                left -= len(text.encode())
                yield text

    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def prepare(corpus: Path, work: Path) -> None:
    """Write `tokenizer.json` and, for each domain, its training and held-out tokens into `work`."""
    work.mkdir(parents=True, exist_ok=True)
    documents = {domain.name: read_documents(domain, corpus) for domain in DOMAINS}
    tokenizer = train_tokenizer(documents, VOCAB_SIZE)
    tokenizer.save(str(work / "tokenizer.json"))
    for name, texts in documents.items():
        order = np.random.default_rng(1).permutation(len(texts))
        for split, is_wanted in (("train", False), ("heldout", True)):
            chosen = [texts[i] for i in order if is_held_out(texts[i]) == is_wanted]
            ids = [
                np.array([*encoding.ids, 0], dtype=np.uint16)  # 0 is <|endoftext|>
                for encoding in tokenizer.encode_batch(chosen)
            ]
            np.save(work / f"{name}.{split}.npy", np.concatenate(ids))
            num_bytes = sum(len(text.encode()) for text in chosen)
            print(name, split, f"{len(chosen)} documents, {num_bytes} bytes", sum(map(len, ids)))


def main() -> None:
    """Parse the command line and write the tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("../shared/data/corpus"))
    parser.add_argument("--work", type=Path, required=True, help="folder to write into")
    args = parser.parse_args()
    prepare(args.corpus, args.work)


if __name__ == "__main__":
    main()
