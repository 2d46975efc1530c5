"""The first argument of several commands: a config, and what the others change in it."""

from itpn.commands.arguments import parse
from itpn.errors import UserError
from itpn.recipes.lookup import Recipe, find, load


def read_config(program: str, arguments: list[str]) -> Recipe:
    """CONFIG [--field value ...], where `--help` after CONFIG lists the fields with that config's values.

    Raises:
        UserError: no config, an unknown one, or an override that does not fit it.
    """
    match arguments:
        case [] | ["-h" | "--help", *_]:
            print(
                f"usage: {program} CONFIG [--field value …]\n\n"
                "CONFIG is a config file, or a name that `itpn configs` lists.\n"
                f"`{program} CONFIG --help` lists the fields."
            )
            raise SystemExit(0 if arguments else 2)
        case [name, *_] if name.startswith("-"):
            raise UserError(f"give the config before {name}: {program} CONFIG [--field value …]")
        case [name, *overrides]:
            config = load(find(name))
            return parse(type(config), overrides, f"{program} {name}", config)
    raise AssertionError
