"""Configs: who wins, what is understood, what reads back equal, how fast."""
import json
from pathlib import Path

import jsonschema
import numpy
import pytest
from pages import ROOT

from trainbook import Config, ConfigError
from trainbook.schema import OPTIMIZERS, SCHEDULERS, Root
from trainbook.source import parse_yaml, spell
from trainbook.spelling import json_schema

GUIDE_001 = """\
training:
  # Optimizer settings
  optimizer: "adamw"
  learning_rate: 1e-4
  weight_decay: 0.01
  momentum: 0.9  # For SGD
  # Scheduler settings
  scheduler: "cosine"
  warmup_epochs: 1
  min_lr: 1e-6
  # Training settings
  num_epochs: 10
  batch_size: 32
  grad_accumulation_steps: 1
  # Checkpoint settings
  checkpoint_dir: "results/saved_models"
  save_frequency: 1
  # Early stopping
  early_stopping: True
  patience: 3
  # Mixed precision
  mixed_precision: True
  # Gradient clipping
  clip_grad_norm: 1.0
"""

GUIDE_003 = """
import os

SKELETON = {
    'model': {'d_global': 256, 'd_region': 128},
    'training': {'lr': 1e-4, 'batch_size': 16, 'epochs': 100, 'save_dir': 'checkpoints_skeleton_hierarchical'},
    'inference': {'threshold': 0.5},
}
TEMPORAL = {
    'model': {'d_temporal': 512},
    'training': {'lr': 1e-4, 'batch_size': 8, 'stage1_epochs': 50},
}
"""


def config(text: str, *words: str) -> Config:
    Path("a.yaml").write_text(text)
    return Config.from_yaml("a.yaml", words)


# --- who wins -------------------------------------------------------------------------------------------------------------------------

def test_command_line_beats_stage_beats_file_beats_parent_beats_default(here):
    Path("base.yaml").write_text("training: {lr: 2, epochs: 2, momentum: 0.2, batch_size: 2}\nstages: [{name: s, training: {clip: 2}}]\n")
    made = config("extends: base.yaml\ntraining: {lr: 3, epochs: 3, momentum: 0.3}\nstages: [{name: s, lr: 4, epochs: 4}]\n", "--lr", "5").stage("s")
    assert (made.training.lr, made.training.epochs, made.training.momentum, made.training.batch_size, made.training.clip, made.training.seed) == (5, 4, 0.3, 2, 2, 42)
    assert [s.place.short for s in made.explain("learning_rate").chain] == ["command line", "a.yaml:3", "a.yaml:2", "base.yaml:1", "default"]


def test_a_stronger_layer_wins_whatever_its_spelling(here):
    Path("base.yaml").write_text("model: {lr: 1}\nlearning_rate: 1\n".splitlines()[0])
    assert config("extends: base.yaml\ntraining: {learning_rate: 2}\n").training.lr == 2
    assert config("extends: base.yaml\n", "-lr", "3").training.lr == 3


def test_later_parents_beat_earlier_ones_and_depth_does_not_matter(here):
    for name, text in {"a0": "training: {lr: 1, epochs: 1}", "a1": "extends: a0.yaml", "a2": "extends: a1.yaml\ntraining: {epochs: 2}", "b": "training: {lr: 9}"}.items(): Path(f"{name}.yaml").write_text(text)
    assert (made := config("extends: [a2.yaml, b.yaml]")).training.lr == 9 and made.training.epochs == 2


def test_extends_is_relative_to_the_file_that_says_it(here):
    (here/"sub"/"deep").mkdir(parents=True)
    Path("sub/base.yaml").write_text("extends: deep/root.yaml")
    Path("sub/deep/root.yaml").write_text("training: {lr: 7}")
    assert config("extends: sub/base.yaml").explain("lr").chain[0].place.short == "sub/deep/root.yaml:1"


def test_a_childs_list_of_stages_decides_and_each_inherits_its_namesake(here):
    Path("base.yaml").write_text("stages:\n  - {name: one, epochs: 1}\n  - {name: two, epochs: 2, init_from: one}\n")
    assert config("extends: base.yaml").stage_names == ["one", "two"]
    made = config("extends: base.yaml\nstages: [{name: two, epochs: 5}]")
    assert made.stage_names == ["two"] and made.stage("two").training.epochs == 5 and made.stage("two").init_from == "one"


def test_a_mapping_is_merged_a_list_replaced_a_null_resets(here):
    Path("base.yaml").write_text("model: {head: {dim: 3, act: gelu}, sizes: [1, 2]}\ntraining: {freeze: {'llm.*': 10}}")
    made = config("extends: base.yaml\nmodel: {head: {dim: 4}, sizes: [5]}\ntraining: {freeze: {'clip.*': 2}}")
    assert made.model.head == {"dim": 4, "act": "gelu"} and made.model.sizes == [5] and made.training.freeze == {"llm.*": 10, "clip.*": 2}
    assert config("extends: base.yaml\nmodel: {head: null}\ntraining: {freeze: null}").model.head is None


def test_merge_wins_over_stages_and_leaves_the_first_alone(here):
    first = config("stages: [{name: s, lr: 4}]")
    second = first.merge({"learning_rate": 5})
    assert (first.stage("s").training.lr, second.stage("s").training.lr, second.training.lr) == (4, 5, 5)
    assert first.merge(config("lr: 8")).stage("s").training.lr == 8


def test_a_word_for_one_stage_beats_a_word_for_all_only_there(here):
    made = config("stages: [{name: s}, {name: t}]", "stages.s.lr=1", "lr=2")
    assert [stage.training.lr for stage in made.stages] == [1, 2]


def test_the_last_of_two_equal_words_wins(here): assert config("{}", "lr=1", "lr=2").training.lr == 2


def test_without_stages_there_is_one(here): assert [(s.name, s.training.lr) for s in config("lr: 3").stages] == [("train", 3)]


# --- what is understood ---------------------------------------------------------------------------------------------------------------

def test_guide_001_as_it_stands(here):
    made = config(GUIDE_001).training
    want = dict(optimizer="adamw", lr=1e-4, weight_decay=0.01, momentum=0.9, scheduler="cosine", warmup=1, min_lr=1e-6, epochs=10, batch_size=32, accumulate=1,
                save_dir="results/saved_models", save_interval=1, early_stopping=True, patience=3, precision="auto", clip=1.0)
    assert {key: made[key] for key in want} == want
    assert dict(**made)["lr"] == 1e-4  # Trainer(model, loader, **config.training)


def test_guide_002_default_yaml():
    made = Config.from_yaml(ROOT/"configs/default.yaml")
    assert (made.model.embed_dim, made.model.num_layers, made.training.lr, made.training.batch_size, made.training.epochs, made.training.save_interval, made.training.keep_last_n,
            made.data.img_size, made.data.num_workers) == (128, 4, 1e-3, 32, 50, 5, 3, 64, 4)
    structural, dense = made.stages
    assert (structural.name, structural.training.epochs, structural.model.full_heads, structural.data.mask_ratio) == ("structural", 30, False, 0.6)
    assert (dense.name, dense.training.epochs, dense.model.full_heads, dense.init_from) == ("dense", 50, True, "best_structural.pth")


def test_guide_003_python_dicts_are_stages(here):
    Path("config.py").write_text(GUIDE_003)
    made = Config.from_yaml("config.py", ["--batch_size", "4", "--d_global", "64"])
    assert made.stage_names == ["skeleton", "temporal"]
    skeleton, temporal = made.stages
    assert (skeleton.model.d_global, skeleton.model.d_region, skeleton.training.epochs, skeleton.inference.threshold, skeleton.training.batch_size) == (64, 128, 100, 0.5, 4)
    assert temporal.training.epochs == 50 and temporal.model.d_temporal == 512


FLAGS = {  # the flags of the guides, as they are typed
    "--batch_size 256 --lr 3e-5 --epochs 10": dict(batch_size=256, lr=3e-5, epochs=10),
    "--learning-rate 3e-5 --num-epochs 10 --weight-decay 1e-6": dict(lr=3e-5, epochs=10, weight_decay=1e-6),
    "--scheduler_step_size 1 --scheduler_gamma 0.87 --checkpoint_dir ./checkpoints/": dict(step_size=1, gamma=0.87, save_dir="./checkpoints/"),
    "--save_dir sweeps/lr_1e-3 --lr 1e-3": dict(save_dir="sweeps/lr_1e-3", lr=1e-3),
    "-lr 1e-4 -batch_size 1 -epochs 100 -save_path output/sttran_predcls": dict(lr=1e-4, batch_size=1, epochs=100, save_dir="output/sttran_predcls"),
    "-weight_decay 1e-5 -clip_grad 5.0 -warmup_steps 1000 -scheduler step": dict(weight_decay=1e-5, clip=5, warmup="1000 steps", scheduler="step"),
    "-save_freq 10 -eval_freq 5": dict(save_interval=10, eval_every=5),
    "-use_amp True -opt_level O1": dict(precision="auto"),
    "-use_amp False": dict(precision="fp32"),
    "-batch_size 1 -accumulate_grad_batches 4": dict(batch_size=1, accumulate=4),
    "-distributed True": dict(distributed=True),
    "--mixed_precision bf16 --no-early-stopping": dict(precision="bf16", early_stopping=False),
    "--optimizer_type SGD --momentum 0.9 --scheduler_type cosine": dict(optimizer="sgd", momentum=0.9, scheduler="cosine"),
    "--opt_level O0": dict(precision="fp32"), "--opt_level O2": dict(precision="auto"), "--opt_level O3": dict(precision="fp16"),
    "--fp16": dict(precision="fp16"), "--max_steps 1_000 --save_steps 100": dict(epochs="1000 steps", save_interval="100 steps"),
    "-nepoch 10": dict(epochs=10), "--epochs=10": dict(epochs=10), "training.lr=1e-2": dict(lr=0.01), "--training.lr=1e-2": dict(lr=0.01),
    "--epochs '10 min'": dict(epochs="10 min"), "--seed 0": dict(seed=0), "--min_lr 0": dict(min_lr=0),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_the_guides(flags, here):
    import shlex
    made = config("{}", *shlex.split(flags)).training
    assert {key: made[key] for key in FLAGS[flags]} == FLAGS[flags]


def test_flags_and_yaml_and_keywords_are_one_language(here):
    for flags in FLAGS:
        import shlex
        from trainbook.source import read_words
        pairs = {key: value.plain() for key, value in read_words(shlex.split(flags)) if "." not in key and not key.startswith("no_")}
        if not pairs: continue
        flags = " ".join(f"--{key}='{value}'" for key, value in pairs.items())
        in_yaml = config("".join(f"{key}: {spell(value)}\n" for key, value in pairs.items()))
        assert in_yaml.diff(Config.from_dict(pairs, "keyword")) == {} == in_yaml.diff(config("{}", *shlex.split(flags))), flags


def test_words_that_yaml_1_1_would_turn_into_something_else(here):
    made = config("run: {name: no, tags: [on, off, y]}\nmodel: {id: 012, ratio: 1e-3, time: 1:30, flag: True, day: 2024-01-15, n: 1_000}")
    assert made.run.name == "no" and made.run.tags == ["on", "off", "y"]
    assert made.model.arguments == {"id": 12, "ratio": 1e-3, "time": "1:30", "flag": True, "day": "2024-01-15", "n": 1000}


def test_data_from_python(here):
    made = Config.from_dict({"training": {"lr": numpy.float32(0.5), "save_dir": Path("a/b"), "betas": (0.9, 0.99)}, "model": "unet"})
    assert made.training.lr == 0.5 and made.training.save_dir == "a/b" and made.training.betas == [0.9, 0.99] and made.model.name == "unet"
    with pytest.raises(ConfigError, match="model.net  expected plain data"): Config.from_dict({"model": {"net": object()}})
    with pytest.raises(ConfigError, match="^keyword  learning_rat  unknown key, did you mean learning_rate"): Config.from_dict({"learning_rat": 1}, "keyword")


def test_an_argument_that_two_sections_have_must_be_named_in_full(here):
    with pytest.raises(ConfigError, match="size  unknown key"): config("model: {size: 1}\ndata: {size: 2}", "--size", "3")
    assert config("model: {size: 1}\ndata: {size: 2}", "--model.size", "3").model.size == 3


@pytest.mark.parametrize("word", ["copy", "json", "dict", "keys", "items", "get", "schema", "validate", "construct", "arguments", "model_fields", "_x", "__init__", "model_config", "config"])
def test_an_argument_may_have_any_name(word, here):
    made = config(f"model: {{name: net, {word}: 3}}\ndata: {{{word}: yes}}")
    assert made.model[word] == 3 and dict(made.model.items())[word] == 3 and made[f"model.{word}"] == 3 and f"  {word}: 3 " in made.to_yaml()
    made.to_yaml("b.yaml")
    assert Config.from_yaml("b.yaml") == made == Config.from_dict(made.to_dict())


def test_a_stage_may_be_called_train(here):
    made = config("stages: [{name: train, lr: 3}]")
    made.to_yaml("b.yaml")
    assert Config.from_yaml("b.yaml").stage("train").training.lr == 3 and made.diff(config("{}")) and made != config("{}")


def test_a_bare_name_is_the_runs(here): assert config("name: mine").run.name == config("{}", "--name", "mine").run.name == "mine"


def test_a_bare_interval_of_logs_counts_steps(here):
    assert [config(f"{word}: 10").logging.every for word in ("log_interval", "log_every", "log_freq")] == ["10 steps"] * 3
    assert config("log_interval: 5 min").logging.every == "5 min" and config("logging: {every: 10}").logging.every == 10


def test_training_words_in_the_wrong_section_are_understood(here):
    made = config("model: {learning_rate: 1, epochs: 2}\ndata: {batch_size: 3}")
    assert (made.training.lr, made.training.epochs, made.training.batch_size, made.model.arguments) == (1, 2, 3, {})


def test_a_flag_that_the_file_knows_is_the_files(here):
    made = config("model: {mode: sgdet, factor: 2, norm: true}", "-mode", "predcls", "--factor", "3", "--no-norm", "--no_decay")
    assert made.model.arguments == {"mode": "predcls", "factor": 3, "norm": False} and made.training.no_decay is True


def test_a_mapping_as_a_word_is_read_like_a_file(here):
    made = config("{}", "model={name: unet, lr: 3, dim: 4}", "training.freeze={'llm.*': 10}")
    assert made.training.lr == 3 and made.model.arguments == {"dim": 4} and made.training.freeze == {"llm.*": 10}


def test_a_search_space_speaks_canonically(here):
    want = {"training.lr": [1, 2], "model.dim": {"low": 1, "high": 3}}
    assert config("search: {space: {learning_rate: [1, 2], model.dim: {low: 1, high: 3}}}").search.space == want
    assert config("{}", "--search.space.training.lr=[1,2]", "search.space.model.dim={low: 1, high: 3}").search.space == want


def test_merge_brings_stages_and_keeps_their_rank(here):
    first = config("lr: 1")
    assert first.merge({"stages": [{"name": "a", "lr": 5}]}).stage("a").training.lr == 5
    Path("p.yaml").write_text("stages: [{name: s, lr: 4}]")
    other = config("extends: p.yaml\nlr: 2")
    assert first.merge(other).stage("s").training.lr == other.stage("s").training.lr == 4
    with pytest.raises(ConfigError, match="extends  is for files"): Config.from_dict({"extends": "p.yaml"})


def test_a_grandparent_counts_once_at_its_weakest_place(here):
    for name, text in {"top": "lr: 1\nepochs: 1", "left": "extends: top.yaml\nlr: 2", "right": "extends: top.yaml\nepochs: 2"}.items(): Path(f"{name}.yaml").write_text(text)
    made = config("extends: [left.yaml, right.yaml]")
    assert (made.training.lr, made.training.epochs) == (2, 2)


def test_wide_and_deep_inheritance_ends(here):
    for i in range(30): Path(f"w{i}.yaml").write_text(f"extends: [w{i + 1}.yaml, w{i + 1}.yaml]" if i < 29 else "lr: 7")
    assert config("extends: w0.yaml").training.lr == 7
    for i in range(100): Path(f"d{i}.yaml").write_text(f"extends: d{i + 1}.yaml")
    with pytest.raises(ConfigError, match="goes more than 50 files deep"): config("extends: d0.yaml")


def test_python_constants_beside_the_dicts_are_left_alone(here):
    Path("c.py").write_text("import os\nROOT = os.getcwd()\nNUM_CLASSES = 5\nlower = {'a': 1}\nA = B = {'lr': 3}\nTRAINING = {'epochs': 2}\n")
    made = Config.from_yaml("c.py")
    assert made.stage_names == ["a", "b"] and made.stage("b").training.lr == 3 and made.training.epochs == 2


def test_what_a_config_hands_out_is_a_copy(here):
    made = config("model: {sizes: [1, 2]}")
    made.model.sizes.append(3); made.to_dict()["model"]["sizes"].append(4)
    assert made.stage("train").model.sizes == [1, 2]
    with pytest.raises(TypeError, match="a config is a value"): made.training = 5


def test_a_config_answers_like_a_mapping(here):
    made = config("lr: 3")
    assert "training" in list(made) and "lr" in made and "lrr" not in made and "model.width" not in made


def test_diff_tells_null_from_absent_and_explain_refuses_sections(here):
    assert repr(config("model: {head: null}").diff(config("{}"))) == "{'model.head': (None, (not set))}"
    with pytest.raises(KeyError, match="is a section; name a key in it"): config("lr: 3").explain("training")
    assert config("model: {a.b: 1}").explain(("model", "a.b")).value == 1


# --- reads back equal -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", sorted((ROOT/"configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_reads_back_equal(file, here):
    made = Config.from_yaml(file, ["--lr", "7e-4"])
    made.to_yaml("again.yaml")
    again = Config.from_yaml("again.yaml")
    assert again == made and Config.from_dict(made.to_dict()) == made and made.diff(again) == {}
    assert [a.to_dict() for a in again.stages] == [m.to_dict() for m in made.stages]


def test_every_value_is_printed_with_its_place():
    lines = Config.from_yaml(ROOT/"configs/default.yaml").to_yaml().splitlines()
    assert not [line for line in lines[1:] if not line.rstrip().endswith(":") and "- name:" not in line and " # " not in line]
    assert len(lines) > 80


def test_nasty_text_reads_back(here):
    notes = "1e-3: # 'x' \"y\" \n\t é ☃ {a: [b]} - ? | > % @ ` null"
    Config.from_dict({"run": {"notes": notes}, "model": {"a b: c": [notes, {"no": None}], "1e5": "1e5"}}).to_yaml("b.yaml")
    assert (again := Config.from_yaml("b.yaml")).run.notes == notes and again.model.arguments == {"a b: c": [notes, {"no": None}], "1e5": "1e5"}


def test_a_config_is_a_value(here):
    made = config("lr: 3")
    with pytest.raises(TypeError, match="config.merge"): made.training.lr = 4
    with pytest.raises(AttributeError, match="did you mean training"): made.trainig
    with pytest.raises(KeyError, match="did you mean learning_rate"): made["learning_rte"]
    assert made["learning_rate"] == made["lr"] == made["training.lr"] == made.training["lr"] == 3


# --- the schema -----------------------------------------------------------------------------------------------------------------------

def test_schema_file_is_fresh(): assert json.loads((ROOT/"configs/schema.json").read_text()) == json_schema(), "make surface"


@pytest.mark.parametrize("file", sorted((ROOT/"configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_names_the_schema_and_fits_it(file):
    text = file.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    jsonschema.validate(parse_yaml(text, file.name).plain(), json_schema())


@pytest.mark.parametrize("text, fits", [(GUIDE_001, True), ("lr: 1e-3\nmodel: unet\nstages: [{name: a, epochs: 3}]", True), ("training: {epochs: 10 min, freeze: ['a.*'], precision: 16-mixed}", True),
                                        ("training: {optimizer: AdamW, compile: yes, freeze: llm.*, scheduler: StepLR, mixed_precision: True}\nrun: {tags: a}\nmodel:\nlogging:", True),
    ("training: {clip: 0}", False), ("training: {limit: 0}", False), ("training: {epochs: 0}", False), ("training: {epochs: 5 bananas}", False), ("training: {opt_level: O9}", False),
    ("training: {max_steps: abc}", False), ("training: {max_steps: 100, use_amp: True}", True), ("training: {distributed: ddp, class_weights: [1, 2], ema: 0.99}", True), ("training: {ema: 2}", False),
    ("training: {learning_rte: 1}", False), ("training: {lr: fast}", False), ("training: {optimizer: adamv}", False), ("stages: [{epochs: 1}]", False), ("training: {epochs: ten}", False)])
def test_an_editor_judges_as_we_do(text, fits, here):
    valid = jsonschema.Draft202012Validator(json_schema()).is_valid(parse_yaml(text, "t").plain())
    try: config(text)
    except ConfigError: assert not valid and not fits
    else: assert valid and fits


def test_optimizer_names_are_those_of_torch():
    import torch
    ours = {name.lower() for name, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer}
    assert set(OPTIMIZERS) == ours


def test_scheduler_names_are_those_of_the_issue(): assert set(SCHEDULERS) == {"cosine", "step", "multistep", "linear", "constant", "onecycle", "polynomial", "plateau"}


def test_every_default_is_acceptable_and_every_key_says_what_it_means():
    from trainbook.schema import Section, mistakes
    for name, section in {n: f.annotation for n, f in Root.model_fields.items() if isinstance(f.annotation, type) and issubclass(f.annotation, Section)}.items():
        assert mistakes({name: {key: field.default for key, field in section.model_fields.items() if field.default is not None}}) == []
        assert all(field.description for field in section.model_fields.values()), name

