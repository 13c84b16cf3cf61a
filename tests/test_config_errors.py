"""What a mistake in a config is answered with: file → exact lines. All lines at once, each with its place, no traceback."""
import os
import sys
import time

import pytest

from trainbook import Config, ConfigError
from trainbook.cli import main

ROWS = {
    # keys
    'misspelt_key': ('training:\n  learning_rte: 1e-3\n', (),
        ['a.yaml:2:3  training.learning_rte  unknown key, did you mean learning_rate?']),
    'misspelt_section': ('trainig:\n  lr: 1e-3\n', (),
        ['a.yaml:1:1  trainig  unknown key, did you mean training?']),
    'misspelt_bare_key': ('epoch: 3\n', (),
        ['a.yaml:1:1  epoch  unknown key, did you mean epochs?']),
    'unknown_key_far_from_all': ('training:\n  zzz: 1\n', (),
        ['a.yaml:2:3  training.zzz  unknown key; `trainbook config schema` lists all keys']),
    'unknown_key_in_a_short_section': ('run:\n  zzz: 1\n', (),
        ['a.yaml:2:3  run.zzz  unknown key; run has name, root, on_existing, tags, notes']),
    'unknown_top_level_key': ('zzz: 1\n', (),
        ['a.yaml:1:1  zzz  unknown key; a config has model, data, training, inference, logging, run, search, stages, extends']),
    'key_of_another_section': ('logging:\n  lr: 1\n', (),
        ['a.yaml:2:3  logging.lr  unknown key, did you mean training.lr?']),
    'number_as_key': ('1: 2\n', (),
        ['a.yaml:1:1  1  unknown key; a config has model, data, training, inference, logging, run, search, stages, extends']),
    'dotted_key': ('training.lr: 3\n', (),
        ['a.yaml:1:1  training.lr  unknown key; write lr below training:']),
    'key_in_other_case': ('training:\n  LR: 3\n', (),
        ['a.yaml:2:3  training.LR  unknown key, did you mean lr?']),
    'two_spellings': ('training:\n  lr: 1e-3\n  learning_rate: 1e-3\n', (),
        ['a.yaml:3:3  training.learning_rate  sets the same as training.lr in line 2; keep one']),
    'two_spellings_in_two_places': ('training:\n  lr: 1e-3\nmodel:\n  lr: 1e-3\n', (),
        ['a.yaml:4:3  model.lr  sets the same as training.lr in line 2; keep one']),
    'bare_and_nested': ('epochs: 3\ntraining:\n  num_epochs: 4\n', (),
        ['a.yaml:3:3  training.num_epochs  sets the same as training.epochs in line 1; keep one']),
    'three_ways_of_saving': ('training:\n  save_frequency: 1\n  save_freq: 2\n  save_interval: 3\n', (),
        ['a.yaml:3:3  training.save_freq  sets the same as save_frequency in line 2; keep one',
         'a.yaml:4:3  training.save_interval  sets the same as save_frequency in line 2; keep one']),
    'amp_and_level_disagree': ('training:\n  use_amp: True\n  opt_level: O0\n', (),
        ['a.yaml:3:3  training.opt_level  sets the same as use_amp in line 2; keep one']),
    'amp_and_mixed_precision': ('training:\n  use_amp: True\n  mixed_precision: True\n', (),
        ['a.yaml:3:3  training.mixed_precision  sets the same as use_amp in line 2; keep one']),
    'duplicate_key': ('training:\n  lr: 1\n  lr: 2\n', (),
        ['a.yaml:3:3  training.lr  stands twice, first in line 2; keep one']),
    'duplicate_section': ('training:\n  lr: 1\ntraining:\n  epochs: 2\n', (),
        ['a.yaml:3:1  training  stands twice, first in line 1; keep one']),
    # values
    'text_for_a_number': ('training:\n  lr: fast\n', (),
        ['a.yaml:2:3  training.lr  expected a number, found fast']),
    'truth_for_a_number': ('training:\n  lr: yes\n', (),
        ['a.yaml:2:3  training.lr  expected a number, found yes']),
    'true_for_a_number': ('training:\n  batch_size: true\n', (),
        ['a.yaml:2:3  training.batch_size  expected a whole number, found true']),
    'null_for_a_number': ('training:\n  lr:\n', (),
        ['a.yaml:2:3  training.lr  expected a number, found null']),
    'list_for_a_number': ('training:\n  lr: [1e-3]\n', (),
        ['a.yaml:2:3  training.lr  expected a number, found [0.001]']),
    'mapping_for_a_number': ('training:\n  lr: {value: 1}\n', (),
        ['a.yaml:2:8  training.lr  expected a number, found {value: 1}']),
    'nan': ('training:\n  lr: .nan\n', (),
        ['a.yaml:2:3  training.lr  expected a number, found .nan']),
    'infinity': ('training:\n  lr: .inf\n', (),
        ['a.yaml:2:3  training.lr  expected a finite number, found .inf']),
    'negative_lr': ('training:\n  lr: -1\n', (),
        ['a.yaml:2:3  training.lr  expected at least 0, found -1']),
    'half_a_batch': ('training:\n  batch_size: 2.5\n', (),
        ['a.yaml:2:3  training.batch_size  expected a whole number, found 2.5']),
    'no_batch': ('training:\n  batch_size: 0\n', (),
        ['a.yaml:2:3  training.batch_size  expected at least 1, found 0']),
    'momentum_of_one': ('training:\n  momentum: 1\n', (),
        ['a.yaml:2:3  training.momentum  expected less than 1, found 1']),
    'ema_out_of_range': ('training:\n  ema: 1.5\n', (),
        ['a.yaml:2:3  training.ema  expected less than 1, found 1.5']),
    'word_for_a_switch': ('training:\n  compile: maybe\n', (),
        ['a.yaml:2:3  training.compile  expected true or false, found maybe']),
    'number_for_text': ('run:\n  name: 2024\n', (),
        ['a.yaml:2:3  run.name  expected text (write "2024" in quotes), found 2024']),
    'list_for_text': ('run:\n  notes: [a, b]\n', (),
        ['a.yaml:2:3  run.notes  expected text, found [a, b]']),
    'unknown_optimizer': ('training:\n  optimizer: adamv\n', (),
        ['a.yaml:2:3  training.optimizer  expected one of adamw, adam, sgd, adadelta, adafactor, adagrad, adamax, asgd, lbfgs, muon, nadam, radam, rmsprop, rprop, sparseadam, or package.module:Name, found adamv, did you mean adam?']),
    'unknown_scheduler': ('training:\n  scheduler: cosin\n', (),
        ['a.yaml:2:3  training.scheduler  expected one of constant, cosine, linear, step, multistep, onecycle, polynomial, plateau, or package.module:Name, found cosin, did you mean cosine?']),
    'unknown_precision': ('training:\n  precision: fp8\n', (),
        ['a.yaml:2:3  training.precision  expected one of auto, fp32, bf16, fp16, found fp8']),
    'unknown_level': ('training:\n  opt_level: O4\n', (),
        ['a.yaml:2:3  training.opt_level  expected one of O0, O1, O2, O3, found O4']),
    'unknown_direction': ('search:\n  direction: up\n', (),
        ['a.yaml:2:3  search.direction  expected one of minimize, maximize, found up']),
    'wrong_value_under_another_name': ('training:\n  learning_rate: fast\n', (),
        ['a.yaml:2:3  training.learning_rate  expected a number, found fast']),
    'wrong_value_at_another_place': ('data:\n  batch_size: many\n', (),
        ['a.yaml:2:3  data.batch_size  expected a whole number, found many']),
    'wrong_steps': ('training:\n  warmup_steps: few\n', (),
        ['a.yaml:2:3  training.warmup_steps  expected a whole number, found few']),
    'one_beta': ('training:\n  betas: [0.9]\n', (),
        ['a.yaml:2:3  training.betas  expected at least 2 values, found [0.9]']),
    'betas_of_text': ('training:\n  betas: [a, b]\n', (),
        ['a.yaml:2:3  training.betas.0  expected a number, found a',
         'a.yaml:2:3  training.betas.1  expected a number, found b']),
    'freeze_of_a_number': ('training:\n  freeze: 3\n', (),
        ['a.yaml:2:3  training.freeze  expected a list, or a mapping, found 3']),
    'groups_of_text': ('training:\n  groups: [llm]\n', (),
        ['a.yaml:2:3  training.groups.0  expected a mapping, found llm']),
    'distributed_unknown': ('training:\n  distributed: horovod\n', (),
        ['a.yaml:2:3  training.distributed  expected true or false, or one of ddp, fsdp, found horovod']),
    # durations
    'epochs_as_word': ('training:\n  epochs: ten\n', (),
        ['a.yaml:2:3  training.epochs  expected a duration (5 is epochs, "200 steps", "10 min"), found ten']),
    'no_epochs': ('training:\n  epochs: 0\n', (),
        ['a.yaml:2:3  training.epochs  expected a duration of more than nothing, found 0']),
    'negative_epochs': ('training:\n  epochs: -3\n', (),
        ['a.yaml:2:3  training.epochs  expected a duration (5 is epochs, "200 steps", "10 min"), found -3']),
    'unknown_unit': ('training:\n  warmup: 3 parsecs\n', (),
        ['a.yaml:2:3  training.warmup  expected a duration (5 is epochs, "200 steps", "10 min"), found 3 parsecs']),
    'broken_steps': ('training:\n  save_interval: 2.5 steps\n', (),
        ['a.yaml:2:3  training.save_interval  expected whole steps, found 2.5 steps']),
    # shapes
    'section_is_a_list': ('training: [1, 2]\n', (),
        ['a.yaml:1:1  training  expected a mapping of settings, found [1, 2]']),
    'section_is_a_number': ('training: 5\n', (),
        ['a.yaml:1:1  training  expected a mapping of settings, found 5']),
    'config_is_a_list': ('- a\n- b\n', (),
        ['a.yaml:1:1  expected a mapping of sections (model, training, …), found [a, b]']),
    'config_is_a_word': ('hello\n', (),
        ['a.yaml:1:1  expected a mapping of sections (model, training, …), found hello']),
    # stages
    'stages_is_a_number': ('stages: 3\n', (),
        ['a.yaml:1:1  stages  expected a list of stages, each with a name, found 3']),
    'stages_is_a_mapping': ('stages:\n  dense: {epochs: 3}\n', (),
        ['a.yaml:1:1  stages  expected a list of stages, each with a name, found {dense: {epochs: 3}}']),
    'stage_without_a_name': ('stages:\n  - epochs: 3\n', (),
        ['a.yaml:2:5  stages.0  expected a mapping with a name, found {epochs: 3}']),
    'stage_is_a_word': ('stages: [dense]\n', (),
        ['a.yaml:1:10  stages.0  expected a mapping with a name, found dense']),
    'stage_name_is_a_path': ('stages:\n  - name: ../up\n', (),
        ['a.yaml:2:5  stages.0.name  expected a name of letters, digits and . _ - that begins with a letter or digit, found ../up']),
    'stage_name_twice': ('stages:\n  - name: a\n  - name: a\n', (),
        ['a.yaml:3:5  stages.1.name  there is a stage a already']),
    'stage_with_a_run': ('stages:\n  - name: a\n    run: {name: b}\n', (),
        ['a.yaml:3:11  stages.a.run.name  belongs to the top of the file, not to a stage']),
    'misspelt_key_in_a_stage': ('stages:\n  - name: a\n    epoch: 3\n', (),
        ['a.yaml:3:5  stages.a.epoch  unknown key, did you mean epochs?']),
    'wrong_value_in_a_stage': ('stages:\n  - name: a\n    training: {momentum: 2}\n', (),
        ['a.yaml:3:16  stages.a.training.momentum  expected less than 1, found 2']),
    'unknown_kind': ('stages:\n  - {name: a, kind: trian}\n', (),
        ['a.yaml:2:15  stages.a.kind  expected one of train, extract, evaluate, found trian, did you mean train?']),
    # YAML
    'tab': ('training:\n\tlr: 1\n', (),
        ['a.yaml:2:1  not YAML: a tab stands here; indent with spaces']),
    'colon_in_text': ('run:\n  notes: a: b\n', (),
        ["a.yaml:2:11  not YAML: mapping values are not allowed here; is the line indented too far, or is there a ':' inside unquoted text?"]),
    'missing_colon': ('training\n  lr: 1\n', (),
        ["a.yaml:2:5  not YAML: mapping values are not allowed here; is the line indented too far, or is there a ':' inside unquoted text?"]),
    'wrong_indent': ('training:\n    lr: 1\n  epochs: 2\n', (),
        ["a.yaml:3:3  not YAML: expected <block end>, but found '<block mapping start>'; is this line indented like its neighbours?"]),
    'open_bracket': ('training:\n  betas: [0.9, 0.99\n', (),
        ["a.yaml:3:1  not YAML: expected ',' or ']', but got '<stream end>'; a bracket is not closed, or a comma is missing"]),
    'open_quote': ('run:\n  notes: "abc\n', (),
        ['a.yaml:3:1  not YAML: found unexpected end of stream; a quote is not closed']),
    'tag': ('model: !!python/object/apply:os.system [echo]\n', (),
        ['a.yaml:1:1  model  the tag !!python/object/apply:os.system is not read; write a plain value']),
    'custom_tag': ('training:\n  lr: !env LR\n', (),
        ['a.yaml:2:3  training.lr  the tag !env is not read; write a plain value']),
    'merge_key': ('a: &a {lr: 1}\ntraining:\n  <<: *a\n', (),
        ['a.yaml:3:3  training.<<  merge keys are not read; use `extends: base.yaml` or a stage']),
    'undefined_alias': ('training:\n  lr: *lr\n', (),
        ['a.yaml:2:7  *lr stands for nothing; define it above with &lr']),
    'alias_bomb': ('model:\n  a: &a [x,x,x,x,x,x,x,x,x,x]\n  b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n  c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n  d: [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n', (),
        ['a.yaml:5:31  aliases and lists make more than 10,000 values; a config has fewer']),
    'too_deep': ('model:\n  a: [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]\n', (),
        ['a.yaml:2:45  nested more than 40 deep']),
    'two_documents': ('run: {name: a}\n---\nrun: {name: b}\n', (),
        ['a.yaml:2:1  a second document begins here; a config is one document']),
    'forbidden_character': ('run:\n  notes: \x07\n', (),
        ['a.yaml:2:10  not YAML: special characters are not allowed']),
    'list_as_key': ('[a, b]: 1\n', (),
        ['a.yaml:1:1  a key must be a single word']),
    # inheritance
    'parent_is_missing': ('extends: nowhere.yaml\n', (),
        ['a.yaml:1:1  extends  nowhere.yaml: no such file; . has a.yaml']),
    'parent_is_misspelt': ({'base.yaml': 'training: {lr: 1}\n', 'a.yaml': 'extends: bsae.yaml\n'}, (),
        ['a.yaml:1:1  extends  bsae.yaml: no such file, did you mean base.yaml?']),
    'parent_is_a_number': ('extends: 3\n', (),
        ['a.yaml:1:1  extends  expected a file or a list of files, found 3']),
    'parent_is_itself': ('extends: a.yaml\n', (),
        ['a.yaml:1:1  extends  goes in a circle: a.yaml → a.yaml']),
    'circle_of_three': ({'c.yaml': 'extends: a.yaml\n', 'b.yaml': 'extends: c.yaml\n', 'a.yaml': 'extends: b.yaml\n'}, (),
        ['c.yaml:1:1  extends  goes in a circle: a.yaml → b.yaml → c.yaml → a.yaml']),
    'mistake_in_a_parent': ({'sub/base.yaml': 'training:\n  lr: fast\n', 'a.yaml': 'extends: sub/base.yaml\ntraining:\n  lr: 1\n'}, (),
        ['sub/base.yaml:2:3  training.lr  expected a number, found fast']),
    'mistakes_in_both': ({'base.yaml': 'training:\n  lrr: 1\n', 'a.yaml': 'extends: base.yaml\ntraining:\n  epohcs: 1\n'}, (),
        ['base.yaml:2:3  training.lrr  unknown key, did you mean lr?',
         'a.yaml:3:3  training.epohcs  unknown key, did you mean epochs?']),
    'parent_is_a_folder': ({'sub/base.yaml': '\n', 'a.yaml': 'extends: sub\n'}, (),
        ['a.yaml:1:1  extends  sub: is a folder, expected a file; name a .yaml file in it']),
    # words of a command line
    'word_without_a_key': ('{}\n', ('abc',),
        ['command line  abc  expected key=value or --key value']),
    'misspelt_flag': ('{}\n', ('--batch-sze', '4'),
        ['command line  batch_sze  unknown key, did you mean batch_size?']),
    'wrong_value_of_a_flag': ('{}\n', ('--lr', 'fast'),
        ['command line  training.lr  expected a number, found fast']),
    'wrong_value_of_a_dotted_word': ('{}\n', ('training.epochs=ten',),
        ['command line  training.epochs  expected a duration (5 is epochs, "200 steps", "10 min"), found ten']),
    'unknown_stage_in_a_word': ('stages: [{name: dense}]\n', ('stages.dens.lr=1',),
        ['command line  stages.dens.lr  there is no stage dens, did you mean dense?']),
    'two_spellings_in_words': ('{}\n', ('--lr', '1', 'learning_rate=2'),
        ['command line  learning_rate  sets the same as --lr (command line); keep one']),
    'broken_list_in_a_word': ('{}\n', ('betas=[0.9,',),
        ["command line  betas:1:6  not YAML: expected the node content, but found '<stream end>'"]),
    'section_as_a_word': ('{}\n', ('training=5',),
        ['command line  training  is a section; name a key in it, for instance training.epochs=…']),
    # Python files
    'python_computes': ({'a.py': "import os\nSKELETON = {'training': {'lr': 10 ** -3, 'epochs': os.cpu_count()}}\n"}, (),
        ['a.py:2:26  SKELETON.training.lr  only literals are read, found 10 ** (-3); write the value itself',
         'a.py:2:42  SKELETON.training.epochs  only literals are read, found os.cpu_count(); write the value itself']),
    'python_misspelt': ({'a.py': "SKELETON = {'training': {'lrr': 1}}\n"}, (),
        ['a.py:1:26  stages.skeleton.training.lrr  unknown key, did you mean lr?']),
    'python_syntax': ({'a.py': 'SKELETON = {\n'}, (),
        ["a.py:1:12  not Python: '{' was never closed"]),
    'python_changes_later': ({'a.py': "SKELETON = {'training': {'lr': 1}}\nSKELETON['training']['lr'] = 5\nSKELETON.update(x=1)\nSKELETON |= {}\n"}, (),
        ['a.py:2:1  SKELETON  is changed here, and nothing is executed; write the value where the dict stands',
         'a.py:3:1  SKELETON  is changed here, and nothing is executed; write the value where the dict stands',
         'a.py:4:1  SKELETON  is changed here, and nothing is executed; write the value where the dict stands']),
    'python_twice': ({'a.py': "A = {'lr': 1, 'lr': 2}\nA = {}\n"}, (),
        ['a.py:1:1  A.lr  stands twice; keep one',
         'a.py:2:1  A  stands twice, first in line 1']),
    'python_dict_call': ({'a.py': 'A = dict(lr=1)\nB = {**A}\n'}, (),
        ['a.py:1:1  A  only literals are read, found dict(lr=1); write the value itself',
         'a.py:2:1  B  only literals are read, found {**A}; write the value itself']),
    'python_odd_key': ({'a.py': "A = {('a', 1): 2}\n"}, (),
        ["a.py:1:1  A  a key must be a word or a whole number, found ('a', 1)"]),
    'run_key_in_a_stage': ('stages:\n  - {name: a, tags: [x], experiment_name: b}\n', (),
        ['a.yaml:2:15  stages.a.tags  belongs to the top of the file, not to a stage',
         'a.yaml:2:26  stages.a.experiment_name  belongs to the top of the file, not to a stage']),
    'stage_named_like_a_folder': ('stages:\n  - name: inbox\n  - name: run.json\n', (),
        ['a.yaml:2:5  stages.0.name  inbox is taken in a run folder',
         'a.yaml:3:5  stages.1.name  run.json is taken in a run folder']),
    'nested_and_plain': ('{}\n', ('model.head=3', 'model.head.dim=4'),
        ['command line  model.head.dim  sets the same as model.head (command line); keep one']),
    'huge_number': ('training: {lr: 9999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999, epochs: 1e400 steps}\n', (),
        ['a.yaml:1:418  training.epochs  expected a duration (5 is epochs, "200 steps", "10 min"), found 1e400 steps',
         'a.yaml:1:12  training.lr  expected a number, found 999999999999999999999999999999999999999999999999999999999...']),
    'huge_whole_number': ('training: {lr: 9999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999}\n', (),
        ['a.yaml:1:12  training.lr  expected a number, found 999999999999999999999999999999999999999999999999999999999...']),
    'key_with_a_line_break': ('"training\\n": 1\n', (),
        ['a.yaml:1:1  "training\\n"  unknown key, did you mean training?']),
    'number_as_argument': ('model: {1: 2}\n', (),
        ['a.yaml:1:9  model.1  unknown key; model has name']),
    'extends_with_nul': ('extends: "a\\0b"\n', (),
        ['a.yaml:1:1  extends  cannot be read: embedded null byte']),
    'extends_as_a_word': ('{}\n', ('--extends', 'b.yaml'),
        ['command line  extends  belongs into the file']),
    'stages_as_a_word': ('stages: [{name: s}]\n', ('stages.s=3',),
        ['command line  stages.s  needs a stage and a key: stages.NAME.training.lr=…']),
    'run_in_a_stage_word': ('stages: [{name: s}]\n', ('stages.s.run.name=foo',),
        ['command line  stages.s.run.name  belongs to the top of the file, not to a stage']),
    'mapping_in_a_word': ('{}\n', ('model={lr: 3}', 'lr=2'),
        ['command line  lr  sets the same as model (command line); keep one']),
    'model_as_a_number': ('{}\n', ('model=3',),
        ['command line  model  is a section; name a key in it, for instance model.name=…']),
    'unknown_key_in_a_space': ('search: {space: {training.lrr: [1]}}\n', (),
        ['a.yaml:1:18  search.space.training.lrr  unknown key, did you mean lr?']),
    'dropped_stage': ({'b.yaml': 'stages: [{name: one}, {name: two}]\n', 'a.yaml': 'extends: b.yaml\nstages: [{name: two}]\n'}, ('stages.one.lr=3',),
        ['command line  stages.one.lr  there is no stage one']),
}


@pytest.mark.parametrize("name", ROWS)
def test_message(name, here, capsys):
    files, words, lines = ROWS[name]
    for file, text in ({"a.yaml": files} if isinstance(files, str) else files).items():
        (here/file).parent.mkdir(exist_ok=True)
        (here/file).write_text(text)
    file = "a.py" if "a.py" in files else "a.yaml"
    with pytest.raises(ConfigError) as error: Config.from_yaml(file, words)
    assert error.value.lines == lines
    assert error.value._render_traceback_() == ["ConfigError", *lines]  # what a notebook shows
    assert main(["config", "show", file, *words]) == 2 and capsys.readouterr() == ("", "\n".join(lines) + "\n")


def make_huge(path): path.write_text("run:\n  notes: x\n" * 6_000_000)


FILES = {
    "missing": (lambda path: None, "a.yaml  no such file"),
    "folder": (lambda path: path.mkdir(), "a.yaml  is a folder, expected a file; name a .yaml file in it"),
    "huge": (make_huge, "a.yaml  has 96,000,000 bytes; a config has at most 1,000,000"),
    "binary": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\x00"), "a.yaml  is not text (byte 0x89 at 0); expected YAML in UTF-8"),
    "zeros": (lambda path: path.write_bytes(b"run:\n\x00"), "a.yaml  is not text (byte 0x00 at 5); expected YAML in UTF-8"),
    "pipe": (lambda path: os.mkfifo(path), "a.yaml  is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a.yaml  is not a regular file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "a.yaml  no such file"),
    "loop of links": (lambda path: path.symlink_to(path), "a.yaml  cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_no_config(name, here, capsys):
    make, line = FILES[name]
    make(here/"a.yaml")
    began = time.perf_counter()
    assert main(["config", "check", "a.yaml"]) == 2
    assert capsys.readouterr().err == line + "\n" and time.perf_counter() - began < 2


def test_file_without_permission(here):
    (here/"a.yaml").write_text("{}")
    (here/"a.yaml").chmod(0)
    here.chmod(0o755)
    read, write = os.pipe()
    if (child := os.fork()) == 0:  # a process of its own: root may read everything, so it becomes nobody first
        sys.stderr = open(write, "w", buffering=1)
        if os.geteuid() == 0: os.setuid(65534)
        os._exit(main(["config", "check", "a.yaml"]))
    os.close(write)
    assert os.read(read, 1000) == b"a.yaml  cannot be read: Permission denied\n" and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    os.close(read)


def test_table_is_large_enough(): assert len(ROWS) + len(FILES) >= 60


@pytest.mark.parametrize("text", ["", "# nothing\n", "training:\nmodel:\n", "\ufefftraining: {lr: 1}\n", "run: {notes: 'a\tb'}\n"])
def test_unusual_and_fine(text, here):
    (here/"a.yaml").write_text(text)
    Config.from_yaml("a.yaml")


def test_a_mistake_in_a_shared_grandparent_is_told_once(here):
    for name, text in {"top": "training: {lrr: 1}", "left": "extends: top.yaml", "right": "extends: top.yaml", "a": "extends: [left.yaml, right.yaml]"}.items(): (here/f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError) as error: Config.from_yaml("a.yaml")
    assert error.value.lines == ["top.yaml:1:12  training.lrr  unknown key, did you mean lr?"]

