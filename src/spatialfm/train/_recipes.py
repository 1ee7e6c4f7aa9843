"""The architectures that can be trained."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from spatialfm._checks import ArgumentError, check_choice, option_readers
from spatialfm.train._heist import HEISTRecipe
from spatialfm.train._heist_niche import HEISTNicheRecipe
from spatialfm.train._hibio import HiBioRecipe
from spatialfm.train._recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

RECIPES: dict[str, type[Recipe]] = {
    recipe.architecture: recipe for recipe in (HEISTRecipe, HEISTNicheRecipe, HiBioRecipe)
}


def check_options(recipe: type[Recipe], options: Mapping[str, Any]) -> None:
    """Raise if the architecture does not have an option; the message names the architectures that do."""
    for name in options:
        if name in recipe.options():
            continue
        readers = option_readers(name, {other.architecture: other.options() for other in RECIPES.values()})
        msg = f"{name}= is an option of {' and '.join(readers)}; {recipe.architecture!r} does not have it"
        raise ArgumentError(msg)


def find_recipe(architecture: str | None, config: Any = None) -> tuple[type[Recipe], Any]:
    """Find the recipe and the config: of the type of ``config`` if it is a config object, or of the architecture."""
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
        msg = f"config={config!r} is not valid for a {name!r} model; its options are {known}"
        raise ValueError(msg) from error
