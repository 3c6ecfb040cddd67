"""Names that others chose: which number is the step, and which tensor is which parameter."""

import re

import pytest
import torch
from cases import Mlp, mlp_loss
from torch import nn

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.names import NamesDiffer, align, read_step, steps_of

CLEAR = {
    "step-240000": 240000,
    "step_360": 360,
    "global_step1000": 1000,
    "stage1-step-40000": 40000,
    "step1000-tokens4B": 1000,
    "step-001000-2BT": 1000,
    "ckpt_001": 1,
    "step-1,000": 1000,
    "step-1,000,000.safetensors": 1_000_000,
    "model-500k": 500_000,
    "model-1M": 1_000_000,
    "ckpt-1.5M.pt": 1_500_000,
    "epoch=1-step=1500-v1.ckpt": 1500,
    "step100_lr1e-3": 100,
    "iter-0040000-ckpt.pth": 40000,
    "Iteration_12": 12,
    "TinyLlama-1.1B-intermediate-step-955k-token-2T": 955_000,
    "epoch-3.pt": 3,
    "max_steps=100-step=20": 20,
    "step_1000_500": 1000,
    "seed3-step100": 100,
    "000100": 100,
}
UNCLEAR = [
    "best-epoch=14-val_loss=0.33.ckpt",
    "epoch-1.5",
    "ckpt_2000_20240430",
    "step_1_000",
    "step-1'000",
    "step-1.000",
    "step-1,0000",
    "step=-1",
    "step1e5",
    "step1k5",
    "step10-iter500",
    "500step_1",
    "warmup_steps100_2000",
    "seed1",
    "model-v2.pt",
    "step99999999999999999999",
]


@pytest.mark.parametrize("name", CLEAR)
def test_clear_step_is_read(name):
    assert read_step(name)[0] == CLEAR[name]


@pytest.mark.parametrize("name", UNCLEAR)
def test_unclear_step_is_refused_with_its_candidates_and_a_pattern(name):
    assert read_step(name)[0] is None
    with pytest.raises(ValueError, match=r"the step is not clear from all names in runs: .*Set pattern") as refused:
        steps_of(["step5", name] if "step" in name else [name], "runs")
    assert f"{name} ({' or '.join(read_step(name)[2])})" in str(refused.value)


def test_names_that_are_read_in_two_ways_are_refused():
    with pytest.raises(ValueError, match=r"checkpoint-500 \(500\); others have it after a word such as step"):
        steps_of(["step-1000", "checkpoint-500"], "runs")
    assert steps_of(["step-1000", "checkpoint-500"], "runs", lenient=True) == ({"step-1000": 1000}, ["checkpoint-500"])
    # Without a word, names must be alike: half precision is no step.
    assert steps_of(["ckpt_1.pt", "ckpt_20.pth"], "runs")[0] == {"ckpt_1.pt": 1, "ckpt_20.pth": 20}
    for lenient in (False, True):
        with pytest.raises(ValueError, match=r"ckpt_1 \(1\), fp16 \(16\)"):
            steps_of(["ckpt_1", "fp16"], "runs", lenient=lenient)


@pytest.mark.parametrize(
    ("names", "proposed"),
    [
        (["D_100.pth", "G_100.pth"], "'D_([0-9]+)'"),
        (["100_model.pt", "100_optimiser.pt"], "'([0-9]+)_model'"),
        (["best-epoch=14-val_loss=0.33"], "'best-epoch=([0-9]+)-val_loss'"),
        (["epoch-1.5", "epoch-2.0"], "'step-([0-9]+)'"),  # not what would read 1.5 as 1
        (["model.pt"], "'step-([0-9]+)'"),
    ],
)
def test_pattern_that_is_proposed_matches_a_whole_number(names, proposed):
    with pytest.raises(ValueError, match="such as " + re.escape(proposed)):
        steps_of(names, "runs")


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("(", "is not a valid regular expression: missing"),
        ("epoch", "has 0 groups; allowed: one, the step"),
        ("(a)(b)", "has 2 groups"),
        ("(final)", "finds 'final' in final; allowed: a whole number"),
        ("x?(x)?", "finds None in final; allowed: a whole number"),
        ("absent-([0-9]+)", "matches none of the names in runs: final"),
    ],
)
def test_pattern_that_does_not_do_is_an_error_of_the_setting(pattern, told):
    with pytest.raises(ValueError, match=told):
        steps_of(["final"], "runs", pattern)


MODEL = Mlp()
STATE = MODEL.state_dict()


def renamed(rename, **more):
    return {rename(name): value for name, value in STATE.items()} | more


class Wrapper(nn.Module):
    """Keeps a module under a name, as wrappers and Lightning modules do."""

    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)


WRAPPED = {
    "as it is": renamed(lambda name: name),
    "compiled in DDP": renamed(lambda name: f"module._orig_mod.{name}"),
    "FSDP in the middle": renamed(lambda name: f"_fsdp_wrapped_module.layers._fsdp_wrapped_module.{name[7:]}"),
    "activation checkpointing": renamed(lambda name: f"layers._checkpoint_wrapped_module.{name[7:]}"),
    "Lightning": renamed(lambda name: f"model.{name}"),
    "Lightning, twice": renamed(lambda name: f"model.net._orig_mod.{name}"),
    "average": renamed(lambda name: f"module.{name}", n_averaged=torch.tensor(7)),
    "extra state": renamed(lambda name: name, **{"layers._extra_state": torch.empty(0)}),
    "buffers": renamed(
        lambda name: f"model.{name}",
        **{
            "model.h.0.attn.bias": torch.ones(1, 1, 4, 4).tril(),
            "model.h.0.attn.masked_bias": torch.tensor(-1e4),
            "model.rotary_emb.inv_freq": torch.ones(2),
        },
    ),
}
MODELS = {
    "plain": Mlp(),
    "Lightning": Wrapper("net", Mlp()),
    "compiled in DDP": Wrapper("module", Wrapper("_orig_mod", Mlp())),
    "compiled": torch.compile(Mlp()),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_removed_on_both_sides(kind, model):
    loss = TokenLoss(MODELS[model], mlp_loss)
    aligned, spare = align(WRAPPED[kind], loss)
    assert torch.equal(loss.flatten(aligned), torch.cat([value.flatten() for value in STATE.values()]))
    assert len(spare) == len(WRAPPED[kind]) - len(STATE)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        # A wrapper beside the same name without it, and a bias that is no mask.
        (
            renamed(lambda name: name, **{"module.layers.0.bias": STATE["layers.0.bias"]}),
            "lacks 'module.layers.0.bias'",
        ),
        (renamed(lambda name: f"model.{name}", **renamed(lambda name: f"ema.{name}")), r"lacks '(model|ema)\."),
        (renamed(lambda name: name, **{"attn.bias": torch.ones(4)}), "the model lacks 'attn.bias'"),
        (
            renamed(lambda name: name.replace("2.b", "3.b")),
            r"lacks 'layers.2.bias' \(nearest: 'layers.3.bias'\); the m",
        ),
        ({"_flat_param": torch.ones(31)}, "flat parameters: save a full state_dict"),
        (renamed(lambda name: name.replace("weight", "parametrizations.weight.original")), "same parametrization"),
    ],
)
def test_names_that_do_not_fit_are_refused_with_the_nearest(tensors, told):
    with pytest.raises(NamesDiffer, match=told):
        align(tensors, TokenLoss(Mlp(), mlp_loss))


def test_model_with_a_wrapper_s_name_inside_is_not_confused():
    """Both ``module.weight`` and ``weight`` are parameters: removing wrappers would mix them up."""
    model = nn.Linear(2, 2)
    model.module = nn.Linear(2, 2)
    loss = TokenLoss(model, mlp_loss)
    state = model.state_dict()
    assert torch.equal(loss.flatten(align(state, loss)[0]), loss.flatten(state))
    with pytest.raises(NamesDiffer):
        align({f"_orig_mod.{name}": value for name, value in state.items()}, loss)


def test_weight_norm_of_either_kind_fits_the_model_with_weight_norm():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    loss, state = TokenLoss(model, mlp_loss), model.state_dict()
    old = {"0.bias": state["0.bias"]}
    old |= {f"0.weight_{'gv'[i]}": state[f"0.parametrizations.weight.original{i}"] for i in range(2)}
    for tensors in (state, old, {f"module.{name}": value for name, value in old.items()}):
        assert torch.equal(loss.flatten(align(tensors, loss)[0]), loss.flatten(dict(model.named_parameters())))


def adapted():
    """Names as in a model of PEFT: base weights are frozen, adapters have a name."""
    layer = nn.Module()
    layer.base_layer, layer.lora_A, layer.lora_B = nn.Linear(3, 3), nn.ModuleDict(), nn.ModuleDict()
    layer.base_layer.requires_grad_(False)
    layer.lora_A["default"], layer.lora_B["default"] = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)
    return Wrapper("base_model", Wrapper("model", Wrapper("out", layer)))


def test_adapters_alone_are_enough_if_they_are_what_is_trained():
    model = adapted()
    loss = TokenLoss(model, mlp_loss)
    trained = {name: value for name, value in model.state_dict().items() if "lora" in name}
    saved = {name.replace(".default", ""): value for name, value in trained.items()}
    assert saved.keys() != trained.keys()
    for tensors in (trained, saved):
        assert torch.equal(loss.flatten(align(tensors, loss)[0]), loss.flatten(trained))
    model.requires_grad_(True)
    with pytest.raises(NamesDiffer, match=r"the checkpoint lacks 'base_model\.model\.out\.base_layer\.weight'"):
        align(saved, TokenLoss(model, mlp_loss))


def test_steps_that_are_counted_in_each_epoch_are_refused():
    with pytest.raises(ValueError, match=r"epoch_2_step_100 and epoch_1_step_300 .* smaller step in a later epoch"):
        steps_of(["epoch_0_step_900", "epoch_1_step_300", "epoch_2_step_100"], "runs")
    assert steps_of(["epoch=0-step=900", "epoch=1-step=1800"], "runs")[0] == {
        "epoch=0-step=900": 900,
        "epoch=1-step=1800": 1800,
    }
