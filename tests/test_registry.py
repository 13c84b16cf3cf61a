"""Names to builders: what is honoured, what is refused, and with which line."""
import sys

import pytest

from trainbook import Config, ConfigError
from trainbook import registry
from trainbook.registry import KINDS, build, find, names, register, wrong_arguments


@pytest.fixture(autouse=True)
def empty(monkeypatch, here):
    "A registry of its own for each test, and the current folder on the path."
    monkeypatch.setattr(registry, "_BUILDERS", {kind: {} for kind in KINDS})
    monkeypatch.syspath_prepend(str(here))


def config(text):
    with open("a.yaml", "w") as file: file.write(text)
    return Config.from_yaml("a.yaml")


def test_a_name_from_a_file_never_imports_anything(here):
    (here/"evil.py").write_text("open('ran', 'w').close()\ndef net(): ...\n")
    with pytest.raises(ConfigError, match="not registered in this process"): find("model", "evil:net", trusted=False)
    assert "evil" not in sys.modules and not (here/"ran").exists()
    assert find("model", "evil:net").__name__ == "net"  # a person's own config may


@pytest.mark.parametrize("name", ["os.system", "os:system:x", "os:", ":system", "os; import x:y", "../evil:net", "os:__class__.__init__.__globals__['x']", "os:a-b", "", "a b:c", "os:système"])
def test_what_is_no_dotted_name_is_not_looked_for(name):
    with pytest.raises(ConfigError, match="is not registered"): find("model", name)


@pytest.mark.parametrize("text, says", [("import no_such_library\n", "ModuleNotFoundError: No module named 'no_such_library'"), ("x = 1\ndef f(:\n", "SyntaxError"), ("1 / 0\n", "ZeroDivisionError: division by zero")])
def test_a_fault_inside_the_users_module_is_one_line_with_its_place(text, says, here):
    name = f"nets{len(text)}"
    (here/f"{name}.py").write_text(text)
    with pytest.raises(ConfigError, match=f"model {name}:Net  its module cannot be imported: {says}.*{name}.py:[12]"): find("model", f"{name}:Net")


def test_an_unknown_kind_is_told():
    for call in (lambda: find("modl", "x"), lambda: names("modl"), lambda: register("modl")):
        with pytest.raises(ConfigError, match="unknown kind, did you mean model"): call()


def test_what_a_section_declares_reaches_a_builder_that_asks_for_it():
    @register("data", "set")
    def make(num_workers, shuffle, size=3): return num_workers, shuffle, size
    assert build("data", config("data: {name: set, num_workers: 4, size: 5}")) == (4, True, 5)
    @register("model", "clip")
    def clip(model_name): return model_name
    assert build("model", config("model: {name: clip, model_name: vit}")) == "vit"


def test_two_builders_under_one_name():
    @register("model", "net")
    def one(): ...
    with pytest.raises(ConfigError, match=r"model net  is taken by .*one; give .*two another name"):
        @register("model", "net")
        def two(): ...
    register("model", "net")(one)  # the same cell once more
    register("data", "net")(one)  # another kind is another name
    assert names("model") == names("data") == ["net"]


def test_arguments_are_given_checked_and_converted():
    @register("model", "net")
    def net(width, *, depth: int = 2, bias: "bool" = None, act="no", **more): return width, depth, bias, act, more
    assert build("model", config("model: {name: net, width: 3, bias: off, act: no, extra: on}")) == (3, 2, False, "no", {"extra": "on"})


def test_all_mistakes_of_a_section_at_once():
    @register("data", "set")
    def make(root, split, size=3): ...
    made = config("data:\n  name: set\n  siez: 4\n  split: x\n")
    assert wrong_arguments("data", made, given=("split",)) == [
        "a.yaml:3:3  data.siez  unknown argument of set, did you mean size?", "a.yaml:4:3  data.split  is passed by the program; take it out of the config", "a.yaml:2:3  data.root  is missing; set needs it"]


def test_an_argument_that_belongs_to_another_section():
    @register("model", "net")
    def net(width=1): ...
    assert wrong_arguments("model", config("model:\n  name: net\n  patience: 3\n")) == ["a.yaml:3:3  model.patience  unknown argument of net, did you mean training.patience?"]


def test_where_the_name_is_missing_or_wrong():
    assert wrong_arguments("model", config("model:\n  width: 3\n")) == ["a.yaml:2:3  model.name  is missing; registered are none; a name elsewhere is written package.module:Name"]
    assert wrong_arguments("model", config("model:\n  name: nope\n")) == ["a.yaml:2:3  model.name  model nope  is not registered; registered are none; a name elsewhere is written package.module:Name"]


def test_a_builder_without_a_signature_takes_what_it_gets(): assert build("model", config("model: {name: 'builtins:dict', a: 1}")) == {"a": 1}


def test_torch_modules_need_no_registry():
    assert build("model", config("model: {name: 'torch.nn:Linear', in_features: 3, out_features: 2, bias: no}")).bias is None
