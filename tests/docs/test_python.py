"""The Python of README.md and docs/guide compiles, and imports only what is there."""

from __future__ import annotations

import ast
import importlib

import pytest

from tests.docs.snippets import PAGES, Block, python_blocks

BLOCKS = [block for page in PAGES for block in python_blocks(page)]
OURS = ("smpo_common", "smpo_schemas", "smpo_models", "smpo_pipeline", "smpo_trainer")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_snippet_compiles_and_its_imports_exist(block: Block) -> None:
    tree = ast.parse(block.code, block.place)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(OURS):
            module = importlib.import_module(node.module)
            missing = [each.name for each in node.names if not hasattr(module, each.name)]
            assert not missing, f"{block.place}: {node.module} has no {missing}"
