"""Holds `windlass tokenize` against llama.cpp on random Unicode text.

    pip install llama-cpp-python gguf
    python benchmarks/tokenizer_peer.py target/release/windlass VOCAB.gguf... [--texts 200] [--seed 1] [--pre qwen2,falcon]

With --pre, the vocabulary of each file is written anew under every one of these names of word patterns. Differences that
are known: `tekken`, `gpt-4o` and `tiny_aya` use patterns in llama.cpp that only resemble the models' own, `deepseek-llm` and
`deepseek-coder` see no Unicode spaces there, and characters of new Unicode versions may be letters to one side only.
"""

import argparse
import ctypes
import json
import pathlib
import random
import subprocess
import tempfile
import unicodedata

import gguf
from llama_cpp import llama_cpp as peer

# Ranges of characters with the chance that one is drawn from them.
RANGES = [
    (35, 0x20, 0x7E), (6, 0x4E00, 0x9FFF), (4, 0xC0, 0x24F), (3, 0x300, 0x36F), (4, 0x400, 0x5FF),
    (3, 0x1F300, 0x1FAFF), (3, 0xAC00, 0xD7A3), (2, 0x3040, 0x30FF), (3, 0xA0, 0x2FFFF),
]
SPACES = " \n\t\r  \u3000\u00a0\u2003\u0085"
PIECES = ["'s", "'LL", "n't", "  ", "\n\n ", "12345", "²", "٤٢", "the ", "Hello", "</s>", "<|im_end|>", "，", "。"]


def special_tokens(path):
    """Control and user-defined tokens of a file, a few of them."""
    fields = gguf.GGUFReader(path).fields
    types = fields["tokenizer.ggml.token_type"].contents()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    return [token for token, kind in zip(tokens, types) if kind in (3, 4)][:20]


def random_text(rng, special):
    text = []
    for _ in range(rng.randint(1, 60)):
        kind = rng.random()
        if kind < 0.2:
            text.append(rng.choice(SPACES))
        elif kind < 0.3:
            text.append(rng.choice(PIECES))
        elif kind < 0.35 and special:
            text.append(rng.choice(special))
        else:
            _, first, last = rng.choices(RANGES, [weight for weight, _, _ in RANGES])[0]
            char = chr(rng.randint(first, last))
            if unicodedata.category(char) not in ("Cn", "Cs", "Co", "Cc"):
                text.append(char)
    return "".join(text)


class Peer:
    """A vocabulary in llama.cpp."""

    def __init__(self, path):
        params = peer.llama_model_default_params()
        params.vocab_only = True
        self.model = peer.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp refuses {path}")
        self.vocabulary = peer.llama_model_get_vocab(self.model)

    def encode(self, text):
        content = text.encode()
        ids = (peer.llama_token * (2 * len(content) + 16))()
        count = peer.llama_tokenize(self.vocabulary, content, len(content), ids, len(ids), True, True)
        return list(ids[:count])


def renamed(path, pre, folder):
    """The same vocabulary under another name of word patterns."""
    reader = gguf.GGUFReader(path)
    target = pathlib.Path(folder) / f"{pre}.gguf"
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "tokenizer.ggml.pre"):
            continue
        kinds = field.types
        if kinds[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), kinds[0])
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return target


def compare(binary, path, count, seed, composed):
    rng = random.Random(seed)
    special = special_tokens(path)
    texts = [random_text(rng, special) for _ in range(count)]
    vocabulary = Peer(path)
    different = 0
    for text in texts:
        if composed:
            text = unicodedata.normalize("NFC", text)
        run = subprocess.run(
            [binary, "tokenize", "--model", path, "--json"], input=text.encode(), capture_output=True, check=True
        )
        report = json.loads(run.stdout)
        # The command drops one line break at the end of its input.
        if report["ids"] != vocabulary.encode(report["text"]):
            different += 1
            if different <= 3:
                print(f"  {report['text']!r}\n    ours {report['ids']}\n    llama.cpp {vocabulary.encode(report['text'])}")
    print(f"{path}: {len(texts) - different} of {len(texts)} texts agree", flush=True)
    return different


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pre", default="")
    args = parser.parse_args()
    quiet = peer.llama_log_callback(lambda *_: None)
    peer.llama_log_set(quiet, ctypes.c_void_p(0))
    peer.llama_backend_init()
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        for path in args.files:
            names = [name for name in args.pre.split(",") if name]
            for name in names:
                # Their tokenizers compose letters first, which llama.cpp does not.
                composed = name in ("qwen2", "qwen35")
                different += compare(args.binary, renamed(path, name, folder), args.texts, args.seed, composed)
            if not names:
                different += compare(args.binary, path, args.texts, args.seed, False)
    raise SystemExit(1 if different else 0)


main()
