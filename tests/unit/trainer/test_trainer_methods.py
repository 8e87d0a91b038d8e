"""What methods do to a model, and that it is undone where it has to be: on real tiny models."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from support.plans import training_plan
from tunesmith_api.keys import ENV_VOLUMES, Reason
from tunesmith_api.v1alpha1.method import QatScheme
from tunesmith_store.errors import UserError
from tunesmith_trainer import methods
from tunesmith_trainer.loop.optimizer import make_optimizer
from tunesmith_trainer.methods.distillation import Distiller
from tunesmith_trainer.methods.pruning import block_influence, prune_layers, remove_layers
from tunesmith_trainer.methods.qat import rounded
from tunesmith_trainer.models.loading import load_options, load_pretrained
from tunesmith_trainer.models.numerics import Numerics
from tunesmith_trainer.tasks.base import IGNORE, Batch, Prediction, Task

CPU = torch.device("cpu")
NUMERICS = Numerics(CPU)
IDS = torch.arange(24).view(2, 12) * 5 % 96


def llama(layers=2, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, use_cache=False, **(sizes | changes))
    )


class Language(Task):
    """The least that methods need of a language task."""

    def __init__(self, plan):
        super().__init__(plan)

    def load_model(self, folder, **options):
        return load_pretrained(AutoModelForCausalLM, folder, **options)

    def predict(self, model, batch):
        logits = model(input_ids=batch.inputs["input_ids"]).logits
        return Prediction(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten())

    def loss(self, model, batch):
        return self.loss_of(self.predict(model, batch))

    check_row = load_processor = encode = collate = assess = metrics = None


Language.__abstractmethods__ = frozenset()


class Classes(Language):
    def head_modules(self, model):
        return ["classifier"]


def batch(learned=8):
    labels = torch.full_like(IDS, IGNORE)
    labels[:, -learned:] = IDS[:, -learned:]
    return Batch({"input_ids": IDS}, labels, float(2 * learned))


def train(model, plan, task, steps=3, rate=1e-2):
    optimizer = make_optimizer(model, plan.training, CPU)
    for _ in range(steps):
        loss = task.loss(model.train(), batch())
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def applied(model, plan, task=None):
    return methods.apply(model, plan, NUMERICS, task or Language(plan), lambda: [batch()])


# ---- adapters


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_merged_model_answers_as_the_adapted_one(kind):
    plan = training_plan(method={"type": kind, "lora": {"r": 4, "alpha": 8}})
    task = Language(plan)
    model = applied(llama(), plan).model
    start = logits(model)
    assert torch.allclose(start, logits(llama()), atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)
    assert ("magnitude" in " ".join(trained)) == (kind == "DoRA")
    train(model, plan, task)
    expected = logits(model)
    assert (expected - start).abs().max() > 1e-2
    merged = methods.finished_model(model, plan, None, task)
    assert type(merged) is LlamaForCausalLM
    assert torch.allclose(logits(merged), expected, atol=1e-4)


def test_rslora_scales_by_the_root_of_the_rank():
    lora = {"r": 16, "alpha": 32, "useRslora": True, "targetModules": ["q_proj"]}
    model = applied(llama(), training_plan(method={"type": "LoRA", "lora": lora})).model
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": pytest.approx(32 / 4)}


def test_adapters_are_a_function_of_the_seed():
    plans = [training_plan(method="LoRA", training={"seed": seed}) for seed in (1, 1, 2)]
    drawn = [applied(llama(), plan).model.state_dict() for plan in plans]
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])
    bound = 1 / math.sqrt(64)
    assert 0.9 * bound < drawn[0][name].abs().max() <= bound


def test_an_unknown_target_is_refused_with_the_names_there_are():
    plan = training_plan(method={"type": "LoRA", "lora": {"targetModules": ["query"]}})
    with pytest.raises(UserError, match=r"targetModules.*down_proj, gate_proj, k_proj") as caught:
        applied(llama(), plan)
    assert caught.value.reason is Reason.INVALID_SPEC


def t5():
    sizes = {"vocab_size": 96, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    return T5ForConditionalGeneration(T5Config(**sizes))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "QLoRA"])
@pytest.mark.parametrize(
    ("make", "targets", "both"),
    [
        (llama, ["q_proj", "lm_head"], "lm_head shares its weights with model.embed_tokens"),
        (llama, ["embed_tokens"], "model.embed_tokens shares its weights with lm_head"),
        (llama, ["embed_tokens", "lm_head"], "shares its weights with"),
        (t5, ["shared"], "shared shares its weights with decoder.embed_tokens and encoder.embed_tokens"),
    ],
)
def test_an_adapter_at_one_end_of_tied_weights_is_refused(make, targets, both, kind):
    plan = training_plan(method={"type": kind, "lora": {"r": 4, "targetModules": targets}})
    with pytest.raises(
        UserError, match=rf"targetModules: .*{both}.*all-linear leaves it out.*method.type: Full"
    ) as got:
        applied(make(), plan)
    assert got.value.reason is Reason.INVALID_SPEC


@pytest.mark.parametrize("make", [llama, t5])
def test_all_linear_leaves_tied_weights_alone(make):
    names = {name for name, _ in applied(make(), training_plan(method="LoRA")).model.named_parameters()}
    assert not any("lora" in name and ("lm_head" in name or "embed" in name or "shared" in name) for name in names)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]])
def test_both_ends_of_untied_weights_can_be_adapted_and_come_back_from_the_files(tmp_path, targets):
    plan = training_plan(method={"type": "LoRA", "lora": {"r": 4, "alpha": 8, "targetModules": targets}})
    task = Language(plan)
    untied = llama()
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    model = applied(untied, plan).model
    train(model, plan, task)
    expected = logits(model)
    methods.finished_model(model, plan, None, task).save_pretrained(tmp_path)
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-4)


def test_adapters_have_nothing_to_adapt_in_random_weights():
    with pytest.raises(UserError, match=r"model\.init Random"):
        applied(llama(), training_plan(method="LoRA", model_init="Random"))


def test_a_new_head_is_trained_whole_and_merged(tmp_path):
    config = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    model = BertForSequenceClassification(config)
    plan = training_plan(task="SequenceClassification", method="LoRA")
    adapted = applied(model, plan, Classes(plan)).model
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any(name.endswith("classifier.modules_to_save.default.weight") for name in trained)
    assert not any("classifier" in name and "lora" in name for name in trained)
    adapted(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    expected = logits(adapted)
    assert torch.allclose(logits(methods.finished_model(adapted, plan, None, Classes(plan))), expected, atol=1e-5)


def test_a_saved_adapter_loads_onto_its_base(tmp_path):
    from peft import PeftModel

    base = tmp_path / "base"
    llama().save_pretrained(base)
    plan = training_plan(method="LoRA")
    model = applied(llama(), plan).model
    train(model, plan, Language(plan))
    methods.save_adapter(model, tmp_path / "adapter", plan)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"], config["r"]) == (plan.model_uri, "CAUSAL_LM", 4)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_an_adapter_of_a_local_run_is_found_with_its_base_by_pefts_automatic_class(tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    base = tmp_path / "models" / "base"
    llama().save_pretrained(base)
    (tmp_path / "volumes").mkdir()
    (tmp_path / "volumes" / "local").symlink_to("/")
    monkeypatch.setenv(ENV_VOLUMES, str(tmp_path / "volumes"))
    plan = training_plan(method="LoRA", model_uri=f"pvc://local{base}")
    model = applied(llama(), plan).model
    methods.save_adapter(model, tmp_path / "adapter", plan)
    assert not (tmp_path / "adapter" / "README.md").exists()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


@pytest.mark.parametrize("twice", [True, False])
def test_qlora_merges_onto_the_stored_base_not_the_rounded_one(tmp_path, twice):
    llama().save_pretrained(tmp_path)
    plan = training_plan(
        method={
            "type": "QLoRA",
            "lora": {"r": 4, "alpha": 8},
            "quantizedBase": {"quantType": "nf4", "useDoubleQuant": twice},
        }
    )
    task = Language(plan)
    model = applied(task.load_model(tmp_path, **load_options(plan, NUMERICS, torch.float32)), plan).model
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype is torch.uint8
    assert layer.base_layer.weight.quant_state.nested is twice
    assert layer.lora_A["default"].weight.dtype is torch.float32
    first, last = train(model, plan, task, 1), train(model, plan, task, 8)
    assert last < first
    delta = layer.get_delta_weight("default").detach().clone()
    merged = methods.finished_model(model, plan, tmp_path, task)
    stored = llama().model.layers[0].mlp.up_proj.weight
    assert torch.allclose(merged.model.layers[0].mlp.up_proj.weight, stored + delta, atol=1e-6)
    assert delta.abs().max() > 1e-3


def test_gradients_pass_a_4_bit_base_after_an_evaluation_as_before(tmp_path):
    llama().save_pretrained(tmp_path)
    plan = training_plan(method="QLoRA")
    task = Language(plan)
    model = applied(task.load_model(tmp_path, **load_options(plan, NUMERICS, torch.float32)), plan).model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.arange(24)[None]

    def gradients():
        return torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    for expected, found in zip(before, gradients(), strict=True):
        assert torch.equal(expected, found)


# ---- quantization-aware training


@pytest.mark.parametrize(("scheme", "kind"), [(QatScheme.INT8, "Q8_0"), (QatScheme.INT4, "Q4_0")])
def test_rounding_is_that_of_gguf_to_the_bit(scheme, kind):
    import gguf

    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(1)) * 0.05
    weight[3, :32] = 0
    kinds = gguf.GGMLQuantizationType[kind]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kinds), kinds)
    np.testing.assert_array_equal(rounded(weight, scheme, 32).numpy(), theirs)


def test_quantization_aware_training_computes_rounded_and_saves_unrounded():
    plan = training_plan(method={"type": "Full", "qat": {"scheme": "Int4", "groupSize": 32}})
    task = Language(plan)
    model = applied(llama(), plan).model
    reference = llama()
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = rounded(module.weight.data, QatScheme.INT4, 32)
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)
    names = [name for name, _ in llama().named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    train(model, plan, task)
    finished = methods.finished_model(copy.deepcopy(model), plan, None, task)
    assert {type(module) for module in finished.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    weight = finished.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, model.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(weight, rounded(weight, QatScheme.INT4, 32))


def test_quantization_loses_less_after_rehearsal():
    """The same steps with and without: what 4 bits cost at the end is less with."""
    losses = {}
    for rehearsed in (False, True):
        plan = training_plan(method={"type": "Full", **({"qat": {"scheme": "Int4"}} if rehearsed else {})})
        task = Language(plan)
        model = applied(llama(), plan).model
        train(model, plan, task, 40, 3e-3)
        finished = methods.finished_model(model, plan, None, task)
        for name, module in finished.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.data = rounded(module.weight.data, QatScheme.INT4, 32)
        losses[rehearsed] = float(task.loss(finished.eval(), batch()))
    assert losses[True] < losses[False]


def test_a_group_size_that_divides_no_layer_is_refused():
    with pytest.raises(UserError, match="groupSize 256 divides none of this model's layers \\(64, 128 wide\\)"):
        applied(llama(), training_plan(method={"type": "Full", "qat": {"groupSize": 256}}))


# ---- pruning


def test_pruned_weights_stay_zero_whatever_the_optimizer_does():
    plan = training_plan(method={"type": "Full", "pruning": {"sparsityPercent": 40}}, training={"weight_decay": 0.1})
    task = Language(plan)
    model = applied(llama(), plan).model
    before = {name: module.weight == 0 for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    train(model, plan, task)
    expected = logits(model)
    finished = methods.finished_model(model, plan, None, task)
    assert [name for name, _ in finished.named_parameters()] == [name for name, _ in llama().named_parameters()]
    for name, module in finished.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        assert torch.equal(module.weight == 0, before[name])
        assert float(before[name].float().mean()) == pytest.approx(0.4, abs=0.01)
        original = dict(llama().named_modules())[name].weight
        assert original[before[name]].abs().max() <= original[~before[name]].abs().min()
    assert torch.allclose(logits(finished), expected, atol=1e-6)


def test_layers_that_do_nothing_are_those_that_go(tmp_path):
    model = llama(layers=5)
    for number in (1, 3):  # a layer whose outputs are zero hands its input on
        model.model.layers[number].self_attn.o_proj.weight.data.zero_()
        model.model.layers[number].mlp.down_proj.weight.data.zero_()
    influence = block_influence(model, [batch()])
    assert influence[1] == pytest.approx(0, abs=1e-6)
    assert influence[3] == pytest.approx(0, abs=1e-6)
    assert min(influence[number] for number in (0, 2, 4)) > 1e-4
    expected = logits(model)
    plan = training_plan(method={"type": "Full", "pruning": {"type": "Layers", "sparsityPercent": 40}})
    prepared = applied(model, plan)
    assert prepared.removed_layers == (1, 3)
    assert torch.allclose(logits(prepared.model), expected, atol=1e-6)
    prepared.model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 3
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    # the cache has a place for each layer that is left
    with_cache = loaded.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    assert torch.equal(
        with_cache, loaded.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
    )


def test_what_differs_by_layer_goes_with_its_layer():
    model = llama(layers=4)
    model.config.layer_types = ["a", "b", "c", "d"]
    remove_layers(model, [1])
    assert model.config.layer_types == ["a", "c", "d"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_padding_does_not_count_in_a_layers_influence():
    model = llama(layers=2)
    padded = torch.cat([IDS, torch.zeros_like(IDS)], 1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros_like(IDS)], 1)
    with_padding = block_influence(model, [Batch({"input_ids": padded, "attention_mask": mask}, padded, 1.0)])
    assert with_padding == pytest.approx(block_influence(model, [batch()]), abs=1e-5)


def test_layers_of_an_encoder_and_a_decoder_are_refused():
    sizes = {"vocab_size": 32, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2}
    with pytest.raises(UserError, match=r"one stack of layers.*set Magnitude"):
        prune_layers(T5ForConditionalGeneration(T5Config(**sizes)), [], 50)


# ---- distillation


def distiller(teacher, temperature=2.0, alpha=0.5):
    plan = training_plan()
    return Distiller(teacher, Language(plan), temperature, alpha), Language(plan)


def test_the_distilled_loss_is_that_of_the_formula():
    student, teacher = llama(), llama(layers=1)
    distilled, task = distiller(teacher, temperature=3.0, alpha=0.7)
    learned = batch().labels[:, 1:] != IGNORE
    own, taught = (model(input_ids=IDS).logits[:, :-1][learned] for model in (student, teacher))
    p, q = (functional.softmax(each / 3, -1) for each in (taught, own))
    divergence = float((p * (p.log() - q.log())).sum())
    cross = float(functional.cross_entropy(own, IDS[:, 1:][learned], reduction="sum"))
    assert float(distilled.loss(task, student, batch())) == pytest.approx(0.7 * 9 * divergence + 0.3 * cross, rel=1e-5)


def test_a_teacher_of_the_same_mind_has_nothing_to_say():
    distilled, task = distiller(llama(), alpha=1.0)
    student = llama()
    loss = distilled.loss(task, student, batch())
    assert float(loss) == pytest.approx(0, abs=1e-4)
    loss.backward()
    assert max(float(parameter.grad.abs().max()) for parameter in student.parameters()) < 1e-4


def test_the_distilled_loss_is_a_sum_over_units_however_it_is_cut():
    distilled, task = distiller(llama(layers=1))
    whole = float(distilled.loss(task, llama(), batch()))
    parts = sum(
        float(
            distilled.loss(task, llama(), Batch({"input_ids": IDS[row : row + 1]}, batch().labels[row : row + 1], 8.0))
        )
        for row in range(2)
    )
    assert parts == pytest.approx(whole, rel=1e-5)


def test_a_teacher_with_another_vocabulary_is_refused():
    distilled, task = distiller(llama(vocab_size=97))
    with pytest.raises(UserError, match="teacherUri: the teacher tells 97 tokens or classes apart and the model 96"):
        distilled.loss(task, llama(), batch())


def test_logits_that_stand_for_no_token_are_left_out_where_both_have_the_same_tokens():
    student, narrow = llama(), llama(layers=1)
    wide = llama(layers=1, vocab_size=101)
    weights = narrow.state_dict()
    with torch.no_grad():
        for name, weight in wide.state_dict().items():
            weight[: len(weights[name])] = weights[name]
    expected, task = distiller(narrow)
    found = Distiller(wide, expected.reader, expected.temperature, expected.alpha, tokens=96)
    assert float(found.loss(task, student, batch())) == pytest.approx(float(expected.loss(task, student, batch())))
    other_way = Distiller(student, expected.reader, 2.0, 1.0, tokens=96)
    wide_loss, narrow_loss = (float(other_way.loss(task, model, batch())) for model in (wide, narrow))
    assert wide_loss == pytest.approx(narrow_loss)


def test_a_student_moves_towards_its_teacher():
    teacher, student = llama(layers=1), llama()
    distilled, task = distiller(teacher, alpha=1.0)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    losses = []
    for _ in range(10):
        loss = distilled.loss(task, student, batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
