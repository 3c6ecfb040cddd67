"""Runs of the hub: tiny models named as Pythia and OLMo are, in folders and behind a server like the hub's."""

import gzip
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
import torch
from cases import flip_bit, token_gradients
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from polca_lib.derivatives.projection import project
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.artefacts import DamagedFile
from polca_lib.storage.checkpoint_folders import SafetensorsFolder
from polca_lib.storage.huggingface import HuggingFaceRevisions, causal_lm, next_token_losses

pytestmark = pytest.mark.slow

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "far", "away"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"vocab_size": 16, "max_position_embeddings": 32}
MODELS = {
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
}


def tokenizer():
    known = {word: number for number, word in enumerate(["<eos>", "<unk>", *WORDS])}
    own = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>", unk_token="<unk>")


def write_run(folder, make, names):
    """Each revision has weights of its own, and a tokenizer."""
    torch.manual_seed(0)
    written = {}
    for name in names:
        model = make().eval()
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        written[name] = model
    return written


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(WORDS[i % 9 :])}) for i in range(40)]
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_those_of_the_model_itself(tmp_path, text, kind):
    written = write_run(tmp_path / "run", MODELS[kind], ["step0", "step1000"])
    subject = causal_lm(str(tmp_path / "run"), str(text), examples=3, context=6, hessian_examples=2)
    loss = TokenLoss(subject.model, subject.loss)
    checkpoints = HuggingFaceRevisions(str(tmp_path / "run"), loss)
    assert checkpoints.steps == [0, 1000]
    assert loss.n_parameters == sum(p.numel() for p in written["step0"].parameters())
    for step in checkpoints.steps:
        theta = checkpoints.theta(step)
        own = loss(theta, subject.validation)
        alone = [written[f"step{step}"](input_ids=w[None], labels=w[None]).loss for w in subject.validation]
        torch.testing.assert_close(own.reshape(3, 5).mean(dim=1), torch.stack(alone))
        loss.check(theta, subject.validation)
        vectors = torch.linalg.qr(torch.randn(loss.n_parameters, 4))[0].T.contiguous()
        expected = token_gradients(loss, theta, subject.validation) @ vectors.T
        for mode in ("forward", "reverse"):
            found = project(loss, theta, subject.validation, vectors, mode=mode)
            torch.testing.assert_close(found.gradient, expected, rtol=1e-3, atol=1e-5)


def test_table_says_what_each_token_is(tmp_path, text):
    write_run(tmp_path / "run", MODELS["neox"], ["step0"])
    subject = causal_lm(str(tmp_path / "run"), str(text), examples=2, context=5, hessian_examples=0)
    assert subject.hessian is None
    # The end of a document is a token, too.
    documents = [[*WORDS[i % 9 :], "<eos>"] for i in range(3)]
    stream = [word for document in documents for word in document]
    assert isinstance(subject.tokens, pd.DataFrame)
    assert subject.tokens["text"].tolist() == stream[1:5] + stream[6:10]
    assert subject.tokens["example"].tolist() == [0] * 4 + [1] * 4
    assert subject.tokens["position"].tolist() == [1, 2, 3, 4] * 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"examples": 0}, "examples = 0; allowed: 1 or more"),
        ({"context": 1}, "context = 1; allowed: 2 or more"),
        ({"examples": 1000}, r"has \d+ tokens; 1002 windows of 6 take 6012"),
    ],
)
def test_text_that_does_not_do_is_refused(tmp_path, text, arguments, told):
    write_run(tmp_path / "run", MODELS["neox"], ["step0"])
    with pytest.raises(ValueError, match=told):
        causal_lm(str(tmp_path / "run"), str(text), **{"examples": 3, "context": 6, "hessian_examples": 2, **arguments})
    text.write_text('{"text": "the cat"}\n{"title": "no text"}\n')
    with pytest.raises(ValueError, match="line 2: it has no text, but"):
        causal_lm(str(tmp_path / "run"), str(text), context=6)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"text": "the cat"}\n\nnull\n', "line 3: it is not an object with text, but of type NoneType"),
        ("a.jsonl", b'{"text": null}', "line 1: its text is not text, but of type NoneType"),
        ("a.jsonl", '{"text": "café"}'.encode("latin-1"), "line 1: it is not UTF-8 .*convert"),
        ("a.txt", "the cat\ncafé".encode("latin-1"), "line 2: it is not UTF-8"),
        ("a.csv", b"text\nthe cat", r"a\.csv can't be read; allowed: .jsonl"),
        ("a.jsonl.zst", b"", r"a\.jsonl\.zst can't be read"),
    ],
)
def test_a_text_that_can_not_be_read_is_refused_by_line_and_reason(tmp_path, name, content, told):
    write_run(tmp_path / "run", MODELS["neox"], ["step0"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        causal_lm(str(tmp_path / "run"), str(tmp_path / name), context=6)


@pytest.mark.parametrize("name", ["b.JSONL", "b.json", "b.jsonl.gz", "b.list.json"])
def test_windows_do_not_depend_on_how_documents_are_stored(tmp_path, name):
    write_run(tmp_path / "run", MODELS["neox"], ["step0"])
    documents = [{"text": f"the cat sat on the mat number {i}"} for i in range(40)]
    lines = "\n".join(map(json.dumps, documents)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    content = json.dumps(documents).encode() if "list" in name else b"\xef\xbb\xbf" + lines + b"\n\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    expected, read = (
        causal_lm(str(tmp_path / "run"), str(tmp_path / file), examples=3, context=6, hessian_examples=2).validation
        for file in ("a.jsonl", name)
    )
    assert torch.equal(expected, read)


def token_loss(make):
    return TokenLoss(make().eval(), next_token_losses)


def test_names_of_olmo_and_stages_of_training_are_known(tmp_path):
    loss = token_loss(MODELS["llama"])
    for name in ("main", "step0-tokens0B", "step1000-tokens4B", "notes"):
        (tmp_path / "olmo" / name).mkdir(parents=True)
    with pytest.warns(UserWarning, match="left aside in .*: notes$"):
        assert HuggingFaceRevisions(str(tmp_path / "olmo"), loss).steps == [0, 1000]
    for name in ("stage1-step0-tokens0B", "stage1-step5000-tokens21B", "stage2-ingredient1-step1000-tokens5B"):
        (tmp_path / "olmo2" / name).mkdir(parents=True)
    two = str(tmp_path / "olmo2")
    with pytest.warns(UserWarning, match="left aside in .*: stage stage2-ingredient1$"):
        assert HuggingFaceRevisions(two, loss).steps == [0, 5000]
    assert HuggingFaceRevisions(two, loss, stage="stage2-ingredient1").steps == [1000]
    with pytest.raises(ValueError, match=r"stage = 'stage9' is not in .* allowed: stage1, stage2-ingredient1"):
        HuggingFaceRevisions(two, loss, stage="stage9")
    with pytest.raises(ValueError, match="has no revision 'step7'; it has main, notes, step0-tokens0B"):
        HuggingFaceRevisions(str(tmp_path / "olmo"), loss, revisions=["step7"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no revisions that name a step"):
        HuggingFaceRevisions(str(tmp_path / "empty"), loss)
    with pytest.raises(ValueError, match=r"revisions = main of .* name no step"):
        HuggingFaceRevisions(str(tmp_path / "olmo"), loss, revisions=["main", "step0-tokens0B"])
    (tmp_path / "olmo" / "step1000-tokens5B").mkdir()
    with pytest.raises(ValueError, match="two revisions of step 1000; name those to use in revisions"):
        HuggingFaceRevisions(str(tmp_path / "olmo"), loss)


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["step-240000", "step-1,000"], [1000, 240000]),
        (["step-001000-2BT", "step-002000-4BT"], [1000, 2000]),
        (["step_360", "step_7"], [7, 360]),
        (["global_step1000", "global_step20"], [20, 1000]),
        (["stage1-step-40000", "stage1-step-500"], [500, 40000]),
        (["epoch1-step100", "epoch2-step200"], [100, 200]),
        (["ckpt_001", "ckpt_010"], [1, 10]),
    ],
)
def test_revisions_of_other_names_are_read_listed_or_by_hand(tmp_path, names, steps):
    loss = token_loss(MODELS["llama"])
    for name in names:
        (tmp_path / name).mkdir()
    assert HuggingFaceRevisions(str(tmp_path), loss).steps == steps
    assert HuggingFaceRevisions(str(tmp_path), loss, revisions=names).steps == steps
    assert HuggingFaceRevisions(str(tmp_path), loss, pattern="([0-9,]+)(?:-2BT)?$").steps  # a pattern selects
    with pytest.raises(ValueError, match="pattern = 'x' has 0 groups"):
        HuggingFaceRevisions(str(tmp_path), loss, pattern="x")


def rewrite(folder, change):
    """Change the tensors of a revision."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "embed_out.weight"}, "the checkpoint lacks 'lm_head.weight'"),
        (lambda t: {f"_orig_mod.{name}": value for name, value in t.items()}, r"the model lacks '_orig_mod\.embed_out"),
        (lambda t: t | {"gpt_neox.final_layer_norm.bias": torch.ones(3)}, "mismatched_keys: .*final_layer_norm.bias"),
        (lambda t: t | {"value_head.weight": torch.ones(3)}, "the model lacks 'value_head.weight'"),
    ],
)
def test_revision_without_all_weights_is_refused_instead_of_filled_at_random(tmp_path, change, told):
    write_run(tmp_path / "run", MODELS["neox"], ["step0", "step1"])
    rewrite(tmp_path / "run" / "step1", change)
    checkpoints = HuggingFaceRevisions(str(tmp_path / "run"), token_loss(MODELS["neox"]))
    assert len(checkpoints.theta(0)) == checkpoints.token_loss.n_parameters
    with pytest.raises(ValueError, match=rf"run@step1 does not have the weights of the model: .*{told}"):
        checkpoints.theta(1)


def test_tied_weights_and_buffers_of_old_are_not_missed(tmp_path):
    written = write_run(tmp_path / "run", MODELS["llama, tied"], ["step0"])
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.masked_bias": torch.tensor(-1e4)}
    rewrite(tmp_path / "run" / "step0", lambda tensors: tensors | buffers)
    loss = token_loss(MODELS["llama, tied"])
    expected = loss.flatten(dict(written["step0"].named_parameters()))
    assert torch.equal(HuggingFaceRevisions(str(tmp_path / "run"), loss).theta(0), expected)
    rewrite(tmp_path / "run" / "step0", lambda t: {n: v for n, v in t.items() if n != "model.embed_tokens.weight"})
    with pytest.raises(ValueError, match=r"lacks 'lm_head.weight', 'model.embed_tokens.weight'"):
        HuggingFaceRevisions(str(tmp_path / "run"), loss).theta(0)


def test_revision_without_safetensors_is_refused_in_one_line(tmp_path):
    write_run(tmp_path / "run", MODELS["neox"], ["step0"])
    (tmp_path / "run" / "step0" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"^\S*run@step0 can't be read: [^\n]*model\.safetensors[^\n]*$"):
        HuggingFaceRevisions(str(tmp_path / "run"), token_loss(MODELS["neox"])).theta(0)


@pytest.mark.parametrize(
    ("field", "value"), [("num_attention_heads", 4), ("rms_norm_eps", 1e-3), ("rope_parameters", {"rope_theta": 5e5})]
)
def test_revision_whose_configuration_is_another_function_is_refused(tmp_path, field, value):
    """Its weights have the same names and shapes: long-context training changes the rotary base, for example."""
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "num_attention_heads": 2}
    write_run(tmp_path / "run", lambda: LlamaForCausalLM(LlamaConfig(**sizes)), ["step0", "step1"])
    file = tmp_path / "run" / "step1" / "config.json"
    config = json.loads(file.read_text())
    config[field] = {**config[field], **value} if isinstance(value, dict) else value
    # Differences that change nothing are allowed.
    file.write_text(json.dumps({**config, "use_cache": False, "attention_dropout": 0.3, "eos_token_id": 3}))
    if field == "num_attention_heads":  # heads of half the width
        file.write_text(json.dumps({**config, "num_key_value_heads": 4, "head_dim": 4}))
    loss = token_loss(lambda: LlamaForCausalLM(LlamaConfig(**sizes)))
    checkpoints = HuggingFaceRevisions(str(tmp_path / "run"), loss)
    assert len(checkpoints.theta(0)) == loss.n_parameters
    with pytest.raises(ValueError, match=rf"run@step1 has {field} = .*, not .* of the model; build the model"):
        checkpoints.theta(1)


class Around(nn.Module):
    """A model of one's own around one of transformers."""

    def __init__(self, inner):
        super().__init__()
        self.language_model = inner


def test_rename_fits_revisions_to_a_model_around_them(tmp_path):
    written = write_run(tmp_path / "run", MODELS["llama"], ["step0"])
    loss = TokenLoss(Around(MODELS["llama"]().eval()), next_token_losses)
    with pytest.raises(ValueError, match=r"does not fit the model: .*set rename"):
        HuggingFaceRevisions(str(tmp_path / "run"), loss).theta(0)
    theta = HuggingFaceRevisions(str(tmp_path / "run"), loss, rename={"^": "language_model."}).theta(0)
    assert torch.equal(theta, torch.cat([p.detach().flatten() for p in written["step0"].parameters()]))


MOE = {"num_key_value_heads": 1, "num_experts_per_tok": 1}
CONVERTED = {
    "neox": MODELS["neox"],
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **MOE, num_local_experts=2)),
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES,
            **MOE,
            num_experts=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            decoder_sparse_step=1,
        )
    ),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_folder_that_transformers_wrote_under_other_names_is_read_by_it(tmp_path, kind):
    """Experts are several tensors in the file and one in the model."""
    written = write_run(tmp_path, CONVERTED[kind], ["checkpoint-500", "checkpoint-1000"])
    loss = token_loss(CONVERTED[kind])
    assert set(load_file(tmp_path / "checkpoint-500" / "model.safetensors")) != set(loss.parameters)
    checkpoints = SafetensorsFolder(tmp_path, loss)
    for step in checkpoints.steps:
        expected = torch.cat([p.detach().flatten() for p in written[f"checkpoint-{step}"].parameters()])
        assert torch.equal(checkpoints.theta(step), expected)
    assert checkpoints.header(500) is None
    rewrite(tmp_path / "checkpoint-500", lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(
        ValueError, match=r"checkpoint-500 does not have the weights of the model: .*the checkpoint lacks"
    ):
        checkpoints.theta(500)
    (tmp_path / "checkpoint-1000" / "config.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-1000 does not fit the model: the checkpoint lacks"):
        checkpoints.theta(1000)


def test_revision_is_at_hand_if_it_is_local_or_in_the_cache(tmp_path, monkeypatch):
    write_run(tmp_path / "run", MODELS["neox"], ["step0", "step1000"])
    loss = TokenLoss(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval(), next_token_losses)
    checkpoints = HuggingFaceRevisions(str(tmp_path / "run"), loss)
    assert checkpoints.at_hand(1000)
    cached = {("someone/model", "model.safetensors", "commit")}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repo, name, revision: "/cache/file" if (repo, name, revision) in cached else None,
    )
    checkpoints.repo = "someone/model"
    assert not checkpoints.at_hand(1000)
    checkpoints._by_step[1000] = checkpoints._by_step[1000]._replace(commit="commit")
    assert checkpoints.at_hand(1000)
    checkpoints._keep = False  # is downloaded each time
    assert not checkpoints.at_hand(1000)


def test_checkpoint_of_another_model_and_a_damaged_one_are_named(tmp_path):
    write_run(tmp_path / "run", MODELS["neox"], ["step0", "step1"])
    other = GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, "hidden_size": 32}))
    with pytest.raises(ValueError, match=r"run@step0 does not fit the model: .* has shape"):
        HuggingFaceRevisions(str(tmp_path / "run"), TokenLoss(other.eval(), next_token_losses)).theta(0)
    flip_bit(tmp_path / "run" / "step1" / "model.safetensors", 3)
    with pytest.raises(DamagedFile, match="run@step1 is damaged"):
        HuggingFaceRevisions(str(tmp_path / "run"), token_loss(MODELS["neox"])).theta(1)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as it takes to list and download revisions of one repository."""

    folder: Path
    asked: list
    listed = False  # whether revisions were listed

    def commit(self, revision):
        return hashlib.sha1(revision.encode()).hexdigest()

    def revision(self, commit):
        return next((p.name for p in self.folder.iterdir() if commit in (p.name, self.commit(p.name))), None)

    def send(self, code, content=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            refs = [{"name": p.name, "ref": f"refs/heads/{p.name}", "targetCommit": self.commit(p.name)}
                    for p in sorted(self.folder.iterdir())]  # fmt: skip
            if parts[-1] == "refs":
                Hub.listed = True
                content = {"branches": refs, "tags": [], "converts": []}
            else:
                name = self.revision(parts[-1]) if "revision" in parts else "step0"
                files = [{"rfilename": p.name} for p in sorted((self.folder / name).iterdir())]
                content = {"id": "lab/tiny", "modelId": "lab/tiny", "sha": self.commit(name), "siblings": files}
                if "tree" in parts:
                    place = self.folder / self.revision(parts[parts.index("tree") + 1])
                    files = [{"path": p.name, "size": p.stat().st_size} for p in sorted(place.iterdir())]
                    content = [{"type": "file", "oid": "0" * 40, **file} for file in files]
            return self.send(200, json.dumps(content).encode(), Content_Type="application/json")
        if "resolve" in parts:
            name = self.revision(parts[parts.index("resolve") + 1])
            if name is None:
                return self.send(404, b"", X_Error_Code="RevisionNotFound")
            file = self.folder / name / parts[-1]
            if not file.exists():
                return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit(name))
            if self.command == "GET" and file.suffix == ".safetensors":
                self.asked.append(name)
            content = file.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.send(200, content, ETag=etag, X_Repo_Commit=self.commit(name), Accept_Ranges="bytes")
        return self.send(404)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """A server, the models it has, and the revisions whose weights were downloaded."""
    written = write_run(tmp_path / "lab", MODELS["neox"], ["main", "step0", "step512", "step1000"])
    handler = type("OwnHub", (Hub,), {"folder": tmp_path / "lab", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", written, handler.asked
    server.shutdown()


SCRIPT = """
import sys, json, torch, typer
sys.path[:0] = {tests!r}
from test_huggingface import MODELS, token_loss
from polca_lib.analysis.cli import reported_errors
from polca_lib.storage.huggingface import HuggingFaceRevisions
try:
  with reported_errors():
    source = HuggingFaceRevisions("lab/tiny", token_loss(MODELS["neox"]), **{arguments!r})
    thetas = {{step: source.theta(step) for step in (1000, 0)}}
except typer.Exit as exit:
    sys.exit(exit.exit_code)
torch.save(thetas, {out!r})
print(json.dumps([source.name(1000), source.identity(1000), source.steps]))
"""


def read_from(address, tmp_path, *, offline=False, **arguments):
    """Read two revisions in a process of its own, with its own cache."""
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = SCRIPT.format(tests=tests, arguments=arguments, out=str(tmp_path / "thetas.pt"))
    env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)


def check_read(done, tmp_path, written, steps):
    assert done.returncode == 0, done.stderr[-3000:]
    name, identity, found = json.loads(done.stdout.splitlines()[-1])
    assert name == "lab/tiny@step1000"
    assert identity == hashlib.sha1(b"step1000").hexdigest()
    assert found == steps
    thetas = torch.load(tmp_path / "thetas.pt", weights_only=True)
    (tmp_path / "thetas.pt").unlink()
    for step, theta in thetas.items():
        expected = torch.cat([p.detach().flatten() for p in written[f"step{step}"].parameters()])
        assert torch.equal(theta, expected)


def weights_left(tmp_path):
    """Files of weights outside the hub, such as in its cache or in a temporary folder."""
    return [file for file in tmp_path.rglob("*.safetensors") if tmp_path / "lab" not in file.parents]


def test_revisions_of_the_hub_are_downloaded_as_they_are_asked_for(tmp_path, hub):
    address, written, asked = hub
    check_read(read_from(address, tmp_path, keep=False), tmp_path, written, [0, 512, 1000])
    assert asked == ["step1000", "step0"]
    assert not weights_left(tmp_path)


def test_what_was_listed_and_kept_is_read_without_a_network(tmp_path, hub):
    address, written, asked = hub
    check_read(read_from(address, tmp_path), tmp_path, written, [0, 512, 1000])
    assert asked == ["step1000", "step0"]
    assert weights_left(tmp_path)
    check_read(read_from(address, tmp_path, offline=True), tmp_path, written, [0, 512, 1000])
    done = read_from(address, tmp_path, offline=True, revisions=["step1000", "step0"])
    check_read(done, tmp_path, written, [0, 1000])
    assert asked == ["step1000", "step0"]


def test_revisions_named_by_hand_need_no_list_and_no_network_the_second_time(tmp_path, hub):
    address, written, asked = hub
    Hub.listed = False
    for offline in (False, True):
        done = read_from(address, tmp_path, offline=offline, revisions=["step0", "step1000"])
        check_read(done, tmp_path, written, [0, 1000])
        assert asked == ["step1000", "step0"]
    assert not Hub.listed


@pytest.mark.parametrize("arguments", [{}, {"revisions": ["step0", "step1000"], "offline": True}])
def test_without_network_and_cache_one_line_says_so(tmp_path, arguments):
    done = read_from("http://127.0.0.1:9", tmp_path, **arguments)  # no server listens there
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error: lab/tiny can't be reached and is not in the cache: ")
    assert done.stderr.splitlines()[-1] == line


def test_unknown_revision_and_repository_of_the_hub_are_named(tmp_path, hub):
    done = read_from(hub[0], tmp_path, revisions=["step0", "step77"])
    assert done.returncode == 2, done.stderr
    assert "error: lab/tiny lacks one of revisions = step0, step77" in done.stderr
    with pytest.raises(FileNotFoundError, match="runs/of/mine is neither a folder nor a repository"):
        HuggingFaceRevisions("runs/of/mine", token_loss(MODELS["neox"]))
