"""The architectures that can be trained."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from spatialfm._checks import check_choice
from spatialfm.train._heist import HEISTRecipe
from spatialfm.train._heist_niche import HEISTNicheRecipe
from spatialfm.train._hibio import HiBioRecipe
from spatialfm.train._recipe import Recipe

RECIPES: dict[str, type[Recipe]] = {
    recipe.architecture: recipe for recipe in (HEISTRecipe, HEISTNicheRecipe, HiBioRecipe)
}


def find_recipe(architecture: str | None, config: Any = None) -> tuple[type[Recipe], Any]:
    """Recipe and config: of the config's own type where it is one, otherwise of the named architecture."""
    for recipe in RECIPES.values():
        if isinstance(config, recipe.config_type):
            if architecture not in (None, recipe.architecture):
                msg = f"architecture={architecture!r}, but config is a {type(config).__name__}; leave one of them out"
                raise ValueError(msg)
            return recipe, config
    name = architecture or "heist"
    check_choice("architecture", name, tuple(RECIPES))
    recipe = RECIPES[name]
    try:
        return recipe, recipe.config_type(**dict(config or {}))
    except TypeError as error:
        known = [f.name for f in fields(recipe.config_type)]
        msg = f"config={config!r} does not describe a {name!r} model, whose options are {known}"
        raise ValueError(msg) from error
