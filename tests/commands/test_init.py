"""`castore init`."""

from __future__ import annotations

from project import Project


def test_init_is_repeatable_and_prints_where(project: Project) -> None:
    assert project.json("init") == {"root": str(project.root / ".castore")}
    (project.root / ".castore" / "config.toml").write_text("[store]\nthreads = 1\n")
    project.call("init")
    assert (project.root / ".castore" / "config.toml").read_text() == "[store]\nthreads = 1\n"
    assert project.call("log") == "no checkpoint yet: `castore train` makes the first one\n"
