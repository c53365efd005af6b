"""The tree of benchmarks/start.py: where seconds go, and which lines are left out."""

import sys

from benchmarks.start import Tree, names


def test_lines_have_what_is_long_and_leave_out_what_only_passes_on() -> None:
    tree = Tree()
    tree.add(["main", "load", "read"], 2.0)
    tree.add(["main", "load", "move"], 1.0)
    tree.add(["main", "log"], 0.05)
    assert tree.seconds == 3.05
    assert tree.lines(0.1) == ["  3.00 load", "    2.00 read", "    1.00 move"]
    assert tree.lines(1.5) == ["  3.00 load", "    2.00 read"]


def test_a_stack_is_named_by_module_and_function_and_an_import_by_its_module() -> None:
    frame = sys._getframe()
    assert names(frame)[-1] == f"{__name__}.{frame.f_code.co_qualname}"
    seen: list[str] = []
    exec(
        compile("see()", "module.py", "exec"),
        {"see": lambda: seen.extend(names(sys._getframe(1))), "__name__": "m"},
    )
    assert seen[-1] == "import m"
