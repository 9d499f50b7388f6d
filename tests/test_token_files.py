"""Tokens that are none, textual inversions, lists without torch; and what the command does where it cannot write."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import make_pipe, pipe_of
from reference import assert_refused, generate
from safetensors.torch import save_file

from ovam_core import InputError, heatmaps, optimize, record, tokens
from ovam_core.cli import main
from ovam_core.cli import optimize as optimize_command
from ovam_core.cli.optimize import save
from ovam_core.errors import is_out_of_memory
from ovam_core.io import files
from ovam_core.models import load
from ovam_core.query import token_prompt
from ovam_core.tokens import TOKEN_FORMAT, Token, import_file

CAT = Token(torch.ones(2, 32), ("background", "cat"), "tiny", loss=0.25, seed=4)
ABOUT = {
    "format": TOKEN_FORMAT,
    "model": "tiny",
    "classes": '["background", "cat"]',
    "branch": "conditional",
    "tau": "0.8",
    "alpha": "0.9",
}

# What is no embedding, and what the sentence says of it.
STRANGE = {
    "3e38": (torch.full((2, 32), 3e38), "1,000,000 is the most"),
    "-3e38": (torch.full((2, 32), -3e38), "1,000,000 is the most"),
    "one of 1e7": (torch.ones(2, 32).index_fill(1, torch.tensor([5]), 1e7), "holds 1e[+]07"),
    "infinite": (torch.full((2, 32), float("inf")), "not finite"),
    "no number": (torch.full((2, 32), float("nan")), "not finite"),
    "float64": (torch.full((2, 32), 1e300, dtype=torch.float64), "not finite"),
    "int64": (torch.ones(2, 32, dtype=torch.int64), "int64"),
    "uint8": (torch.ones(2, 32, dtype=torch.uint8), "uint8"),
    "bool": (torch.ones(2, 32, dtype=torch.bool), "bool"),
    "complex": (torch.ones(2, 32, dtype=torch.complex64), "complex64"),
    "flat": (torch.ones(32), "rows, width"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_no_embedding_is_refused_wherever_tokens_come_from(tmp_path, case):
    embedding, part = STRANGE[case]
    with pytest.raises(InputError, match=part):
        Token(embedding, ("background", "cat"), "tiny")
    with pytest.raises(InputError, match=part):
        replace(CAT, embedding=embedding)
    save_file({"embedding": embedding}, tmp_path / "x.safetensors", ABOUT)
    with pytest.raises(InputError, match=part):
        Token.load(tmp_path / "x.safetensors")
    if embedding.ndim == 2:
        np.save(tmp_path / "x.npy", embedding.numpy())
        with pytest.raises(InputError):
            import_file(tmp_path / "x.npy", "tiny")
        save_file({"<cat>": embedding}, tmp_path / "cat.safetensors")
        with pytest.raises(InputError):
            import_file(tmp_path / "cat.safetensors", "tiny")


def test_embeddings_that_are_asked_directly(tiny):
    with record(tiny) as r:
        generate(tiny, steps=1)
    target = np.zeros((32, 48), np.uint8)
    target[:8] = 1
    for kind in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(InputError, match="floating-point"):
            heatmaps(r.recordings[0], torch.ones(2, 32, dtype=kind))
        with pytest.raises(InputError, match="floating-point"):
            optimize(r.recordings, [target], torch.ones(2, 32, dtype=kind))
    for large in (3e38, -3e38, float("nan")):
        with pytest.raises(InputError, match="no numbers"):
            heatmaps(r.recordings[0], torch.full((2, 32), large) * torch.tensor([[1.0], [-1.0]]))
        with pytest.raises(InputError, match="no numbers"):
            heatmaps(r.recordings[0], torch.full((3, 32), large))
    kept = Token(torch.full((2, 32), 9e5) * torch.randn(2, 32).sign(), ("background", "cat"), "tiny")
    assert heatmaps(r.recordings[0], kept.embedding).isfinite().all()


def test_a_token_beyond_the_models_own_numbers(fresh):
    fresh.ovam_name = "tiny"
    large = Token(torch.full((2, 32), 1e5), ("background", "cat"), "tiny")
    assert token_prompt(fresh, large).labels == ("cat",)
    fresh.to(dtype=torch.float16)
    with pytest.raises(InputError, match="float16, in which this model computes"):
        token_prompt(fresh, large)


# ------------------------------------------------------------------------------------------------ lists


def test_the_list_says_what_the_tokens_say_without_torch(tmp_path):
    CAT.save(tmp_path / "cat.safetensors")
    replace(CAT, embedding=torch.ones(3, 32), classes=("background", "a dog", "the cow"), loss=None, seed=None).save(
        tmp_path / "two.safetensors"
    )
    Token(torch.ones(1, 8).half(), ("one",), "m", "unconditional").save(tmp_path / "a.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    save_file({"embedding": torch.ones(2, 3)}, tmp_path / "short.safetensors", {**ABOUT, "classes": '["cat"]'})
    code = (
        "import sys; from ovam_core.cli import main; status = main(sys.argv[1:])\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "tokens", "list", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    one, broken, cat, other, short, two = done.stdout.splitlines()
    assert one == f"one: 1x8, m, unconditional: {tmp_path / 'a.safetensors'}"
    assert cat == f"cat: 2x32, tiny, conditional, loss 0.2500, seed 4: {tmp_path / 'cat.safetensors'}"
    assert two == f"a dog, the cow: 3x32, tiny, conditional: {tmp_path / 'two.safetensors'}"
    assert broken.startswith("broken.safetensors: 'broken.safetensors' is not a whole safetensors file")
    assert "is not a token" in other
    assert "lacks a setting" in short


def test_what_cannot_be_listed(tmp_path):
    data = CAT.save(tmp_path / "cat.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for cut in (0, 7, 30, len(data) - 1):
        (tmp_path / "x.safetensors").write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"not a whole|lacks a setting"):
            tokens_list(tmp_path / "x.safetensors")
    for change in (
        {"embedding": {**header["embedding"], "dtype": "I64"}},
        {"embedding": {**header["embedding"], "shape": [2]}},
        {"embedding": {**header["embedding"], "shape": [2, 33]}},
        {"embedding": 3},
        {"__metadata__": {**header["__metadata__"], "classes": "["}},
        {"__metadata__": {**header["__metadata__"], "seed": "x"}},
        {"__metadata__": 3},
    ):
        text = json.dumps(header | change).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(InputError):
            tokens_list(tmp_path / "x.safetensors")


def tokens_list(path):
    from ovam_core.io.token_files import list_token

    return list_token(path)


# ------------------------------------------------------------------------------------------ textual inversions


def saved_by_torch(path, content):
    torch.save(content, path)
    return path


VECTORS = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))
A1111 = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": torch.nn.Parameter(VECTORS)},
    "name": "my-cat",
    "step": 500,
    "sd_checkpoint": None,
    "sd_checkpoint_name": "v1-5",
}
INVERSIONS = {
    "diffusers": (lambda p: save_file({"<cat-toy>": VECTORS[0]}, p), "x.safetensors", "cat toy", VECTORS[:1]),
    "several vectors": (lambda p: save_file({"<cat>": VECTORS}, p), "x.safetensors", "cat", VECTORS),
    "emb_params": (lambda p: save_file({"emb_params": VECTORS[:1]}, p), "a_bus-x.safetensors", "a bus x", VECTORS[:1]),
    "half": (lambda p: save_file({"<cat>": VECTORS[0].half()}, p), "x.safetensors", "cat", VECTORS[:1].half()),
    "bfloat16": (lambda p: save_file({"<c>": VECTORS[0].bfloat16()}, p), "x.safetensors", "c", VECTORS[:1].bfloat16()),
    "bin": (lambda p: torch.save({"<cat-toy>": VECTORS[0]}, p), "learned_embeds.bin", "cat toy", VECTORS[:1]),
    "bin of a parameter": (
        lambda p: torch.save({"<cat>": torch.nn.Parameter(VECTORS[:1])}, p), "x.bin", "cat", VECTORS[:1]
    ),
    "a tensor": (lambda p: torch.save(VECTORS[1], p), "my_cat.pt", "my cat", VECTORS[1:2]),
    "A1111": (lambda p: torch.save(A1111, p), "x.pt", "my cat", VECTORS),
}  # fmt: skip


@pytest.mark.parametrize("case", INVERSIONS)
def test_textual_inversions(tmp_path, case):
    write, name, word, vectors = INVERSIONS[case]
    write(tmp_path / name)
    (token,) = import_file(tmp_path / name, "somebody/stable-diffusion-v1-5")
    assert token.classes == (word,)
    assert torch.equal(token.embedding, torch.from_numpy(vectors.float().numpy().mean(axis=0, keepdims=True)))
    assert token.init == f"textual inversion imported from {name}"
    assert Token.load(token.save(tmp_path / "out.safetensors")).names == (word,)
    (named,) = import_file(tmp_path / name, "m", classes=["a tram"])
    assert named.classes == ("a tram",)


def test_textual_inversions_of_sdxl_and_of_several_words(tmp_path):
    first, second = torch.randn(2, 768), torch.randn(2, 1280)
    save_file({"clip_g": second, "clip_l": first}, tmp_path / "xl-cat.safetensors")
    (token,) = import_file(tmp_path / "xl-cat.safetensors", "stabilityai/stable-diffusion-xl-base-1.0")
    assert token.classes == ("xl cat",)
    torch.testing.assert_close(token.embedding[0], torch.cat([first, second], dim=1).mean(dim=0))
    torch.save({"<cat>": torch.ones(768), "<dog>": torch.zeros(2, 768)}, tmp_path / "two.bin")
    cat, dog = import_file(tmp_path / "two.bin", "m")
    assert (cat.classes, dog.classes) == (("cat",), ("dog",))
    with pytest.raises(InputError, match="2 words and 1 names"):
        import_file(tmp_path / "two.bin", "m", classes=["cow"])


def test_a_width_that_does_not_fit_is_named(tmp_path, monkeypatch):
    save_file({"<cat>": torch.ones(1024)}, tmp_path / "cat.safetensors")
    for model in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4"):
        with pytest.raises(InputError, match=r"'cat.safetensors' is 1024 wide, and stable-diffusion-v1-. takes 768"):
            import_file(tmp_path / "cat.safetensors", model)
    pipe_of("sd").unet.save_config(tmp_path / "mine" / "unet")
    with pytest.raises(InputError, match="is 1024 wide, and mine takes 32"):
        import_file(tmp_path / "cat.safetensors", str(tmp_path / "mine"))
    monkeypatch.setattr(tokens, "FOLDER", tmp_path / "tokens")
    CAT.save(tokens.folder_for("owner/other") / "cat.safetensors")
    with pytest.raises(InputError, match="is 1024 wide, and other takes 32"):
        import_file(tmp_path / "cat.safetensors", "owner/other")
    assert import_file(tmp_path / "cat.safetensors", "owner/unknown")[0].embedding.shape == (1, 1024)
    save_file({"clip_l": torch.ones(1, 768)}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match=r"is 768 wide, and stable-diffusion-xl-base-1.0 takes 2048"):
        import_file(tmp_path / "half.safetensors", "stabilityai/stable-diffusion-xl-base-1.0")


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def packed(path):
    """A bomb: torch's file, packed, of more than it says."""
    inner = io.BytesIO()
    torch.save({"<cat>": torch.zeros(4_000_000)}, inner)
    with zipfile.ZipFile(inner) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))


ST = "x.safetensors"
VIEW = torch.zeros(1, 1).expand(10**6, 10**6)  # a terabyte, by its shape
UNEVEN = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(2, 1280)}
LORA = {"up": torch.ones(4, 320), "down": torch.ones(768, 4)}
OLD = {"_use_new_zipfile_serialization": False}
NONE = {
    "a call": (lambda p: torch.save({"<cat>": Evil()}, p), "x.bin", "other than tensors"),
    "a bomb": (packed, "x.bin", "compressed"),
    "a view of a terabyte": (lambda p: torch.save({"<c>": VIEW}, p), "x.pt", "floating-point"),
    "an old file": (lambda p: torch.save({"<c>": torch.ones(3)}, p, **OLD), "x.pt", "torch 1.6"),
    "an archive": (lambda p: np.savez(p, a=np.ones(3)), "x.npz", "other than tensors"),
    "words": (lambda p: torch.save({"cat": "dog"}, p), "x.pt", "other than tensors"),
    "a list": (lambda p: torch.save([1, 2], p), "x.pt", "neither a tensor"),
    "nothing": (lambda p: torch.save({}, p), "x.pt", "0 tensors"),
    "a LoRA": (lambda p: save_file(LORA, p), ST, "4, 320 wide"),
    "four dimensions": (lambda p: save_file({"w": torch.ones(2, 3, 1, 1)}, p), ST, "floating-point"),
    "uneven": (lambda p: save_file(UNEVEN, p), ST, "broken"),
    "a token": (CAT.save, ST, "already"),
    "cut": (lambda p: p.write_bytes(b"\x10\0\0\0\0\0\0\0{" + b" " * 9), ST, "not a whole safetensors"),
    "a cut archive": (lambda p: p.write_bytes(b"PK\x03\x04" + b"\0" * 40), "x.bin", "not a whole file"),
}


@pytest.mark.parametrize("case", NONE)
def test_files_that_are_no_textual_inversion(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    write, name, part = NONE[case]
    write(tmp_path / name)
    with pytest.raises(InputError, match=part) as caught:
        import_file(tmp_path / name, "m")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
    assert main(["tokens", "import", name, "--model", "m", "--out", "out"]) == 2
    assert_refused(capsys.readouterr().err.strip(), part)


def test_the_command_says_what_a_textual_inversion_is(tmp_path, capsys):
    save_file({"<cat-toy>": VECTORS[0]}, tmp_path / "x.safetensors")
    assert (
        main(["tokens", "import", str(tmp_path / "x.safetensors"), "--model", "m", "--out", str(tmp_path / "out")]) == 0
    )
    said = capsys.readouterr().out
    assert said.startswith(f"cat toy: {tmp_path / 'out' / 'cat-toy.safetensors'}\n")
    assert "load_textual_inversion" in said


@pytest.mark.parametrize("words", [("<cat-toy>", "<cat_toy>"), ("cat", "CAT"), ("<a b>", "dog", "a.b")])
def test_two_words_of_one_file_name_do_not_overwrite_each_other(words, tmp_path, capsys):
    save_file({word: VECTORS[0].clone() for word in words}, tmp_path / "x.safetensors")
    command = ["tokens", "import", str(tmp_path / "x.safetensors"), "--model", "m", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "give one file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    names = [f"word {number}" for number, _ in enumerate(words)]
    assert main([*command, "--class", *names]) == 0
    assert len(list((tmp_path / "out").iterdir())) == len(words)


# ---------------------------------------------------------------------------------- where it cannot be written


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    pipe = make_pipe()
    pipe.unet.register_to_config(sample_size=32)
    monkeypatch.setattr("ovam_core.ovam.load_pipeline", lambda *_given, **_more: pipe)


@pytest.mark.parametrize("case", ["long name", "long folder", "a folder", "within a file"])
def test_a_name_that_cannot_be_is_known_before_the_work(tmp_path, monkeypatch, capsys, nothing_is_loaded, case):
    from PIL import Image

    from ovam_core.ovam import OVAM

    monkeypatch.setattr(OVAM, "draw", lambda *given, **more: pytest.fail("an image was made"))
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    (tmp_path / "file").write_text("")
    out, part = {
        "long name": (tmp_path / ("a" * 300), "file name too long"),
        "long folder": (tmp_path / ("a" * 300) / "cat.safetensors", "file name too long"),
        "a folder": (tmp_path, "is a folder"),
        "within a file": (tmp_path / "file" / "cat.safetensors", "lies in, a file"),
    }[case]
    asked = ["--prompt", "the cat", "--mask", str(tmp_path / "mask.png"), "--class", "cat", "--out", str(out)]
    assert main(["optimize", *asked]) == 2
    assert_refused(capsys.readouterr().err.strip(), part)


def test_a_token_is_kept_elsewhere_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(path, data):
        if path.parent == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_bytes(data)

    monkeypatch.setattr(tokens, "write_atomically", full)
    monkeypatch.setattr(optimize_command.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="no space left on device") as caught:
        save(CAT, tmp_path / "cat.safetensors")
    kept = str(caught.value).split("'")[-2]
    assert torch.equal(Token.load(kept).embedding, CAT.embedding)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EDQUOT])
def test_what_the_system_refuses_is_one_sentence(monkeypatch, capsys, number):
    def refusing(*_given):
        raise OSError(number, "It Is So", "/some/file")

    monkeypatch.setattr("ovam_core.cli.tokens.Path", refusing)
    assert main(["tokens", "list"]) == 2
    assert_refused(capsys.readouterr().err.strip(), "'/some/file': it is so.")


def test_other_errors_of_files_are_bugs(monkeypatch):
    def lost(*_given):
        raise FileNotFoundError(errno.ENOENT, "No such file", "/some/file")

    monkeypatch.setattr("ovam_core.cli.tokens.Path", lost)
    with pytest.raises(FileNotFoundError):
        main(["tokens", "list"])


SHORT = [
    RuntimeError("could not create a primitive"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    MemoryError(),
    MemoryError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    RuntimeError("can't start new thread"),
]


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_too_little_memory_is_one_sentence(tmp_path, monkeypatch, capsys, nothing_is_loaded, error):
    from diffusers import DiffusionPipeline

    from ovam_core.ovam import OVAM

    def failing(*_given, **_more):
        raise error

    monkeypatch.setattr(OVAM, "draw", failing)
    assert main(["generate", "the cat", "--words", "cat", "--out", str(tmp_path)]) == 2
    assert_refused(capsys.readouterr().err.strip(), "too little memory")
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", failing)
    with pytest.raises(InputError, match="too little memory to load"):
        load._from_pretrained("emoji-voc", tmp_path, torch.float32)
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))


def test_the_check_of_a_name_leaves_nothing(tmp_path):
    files.check_file_name(tmp_path / "new" / "cat.safetensors")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "there").write_text("kept")
    files.check_file_name(tmp_path / "there")
    assert (tmp_path / "there").read_text() == "kept"
