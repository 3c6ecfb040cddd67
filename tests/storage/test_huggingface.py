"""Runs of the hub: tiny models named as Pythia and OLMo are, in folders and behind a server like the hub's."""

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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polca_lib.derivatives.projection import project
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.artefacts import DamagedFile
from polca_lib.storage.huggingface import HuggingFaceRevisions, causal_lm, next_token_losses

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
    with pytest.raises(ValueError, match="line 2, has no field 'text'"):
        causal_lm(str(tmp_path / "run"), str(text), context=6)


def token_loss(make):
    return TokenLoss(make().eval(), next_token_losses)


def test_names_of_olmo_and_stages_of_training_are_known(tmp_path):
    loss = token_loss(MODELS["llama"])
    for name in ("main", "step0-tokens0B", "step1000-tokens4B", "notes"):
        (tmp_path / "olmo" / name).mkdir(parents=True)
    assert HuggingFaceRevisions(str(tmp_path / "olmo"), loss).steps == [0, 1000]
    for name in ("stage1-step0-tokens0B", "stage1-step5000-tokens21B", "stage2-ingredient1-step1000-tokens5B"):
        (tmp_path / "olmo2" / name).mkdir(parents=True)
    two = str(tmp_path / "olmo2")
    assert HuggingFaceRevisions(two, loss).steps == [0, 5000]
    assert HuggingFaceRevisions(two, loss, stage="stage2-ingredient1").steps == [1000]
    with pytest.raises(ValueError, match=r"stage = 'stage9' is not in .* allowed: stage1, stage2-ingredient1"):
        HuggingFaceRevisions(two, loss, stage="stage9")
    with pytest.raises(ValueError, match="has no revision 'step7' that names a step; it has step0-tokens0B"):
        HuggingFaceRevisions(str(tmp_path / "olmo"), loss, revisions=["step7"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no revisions that name a step"):
        HuggingFaceRevisions(str(tmp_path / "empty"), loss)
    (tmp_path / "olmo" / "step1000-tokens5B").mkdir()
    with pytest.raises(ValueError, match="two revisions of step 1000; name those to use in revisions"):
        HuggingFaceRevisions(str(tmp_path / "olmo"), loss)


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

    def commit(self, revision):
        return hashlib.sha1(revision.encode()).hexdigest()

    def revision(self, commit):
        return next(p.name for p in self.folder.iterdir() if commit in (p.name, self.commit(p.name)))

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
import sys, json, torch
sys.path[:0] = {tests!r}
from test_huggingface import MODELS, token_loss
from polca_lib.storage.huggingface import HuggingFaceRevisions
source = HuggingFaceRevisions("lab/tiny", token_loss(MODELS["neox"]), keep={keep})
assert source.steps == [0, 512, 1000], source.steps
thetas = {{step: source.theta(step) for step in (1000, 0)}}
torch.save(thetas, {out!r})
print(json.dumps([source.name(1000), source.identity(1000)]))
"""


@pytest.mark.parametrize("keep", [True, False])
def test_revisions_of_the_hub_are_downloaded_as_they_are_asked_for(tmp_path, hub, keep):
    address, written, asked = hub
    out, cache = tmp_path / "thetas.pt", tmp_path / "cache"
    script = SCRIPT.format(tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])], keep=keep, out=str(out))
    env = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert asked == ["step1000", "step0"]
    name, identity = json.loads(done.stdout.splitlines()[-1])
    assert name == "lab/tiny@step1000"
    assert identity == hashlib.sha1(b"step1000").hexdigest()
    thetas = torch.load(out, weights_only=True)
    for step, theta in thetas.items():
        expected = torch.cat([p.detach().flatten() for p in written[f"step{step}"].parameters()])
        assert torch.equal(theta, expected)
    assert bool(list(cache.rglob("*.safetensors"))) == keep
    left = [file for file in tmp_path.rglob("*.safetensors") if tmp_path / "lab" not in file.parents]
    assert bool(left) == keep
