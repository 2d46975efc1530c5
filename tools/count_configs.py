"""Count every packaged config anew, into `configs/sizes.json`, which `itpn configs` shows.

    python tools/count_configs.py

Then put the output of `itpn configs --markdown` into docs/configs.md; a test says where it differs.
"""

import json

from itpn.commands.info import size_of
from itpn.recipes.lookup import config_files, load, packaged

sizes = {name: size_of(load(path)) for name, path in sorted(config_files(packaged()).items())}
lines = (f"  {json.dumps(name)}: {json.dumps(size)}" for name, size in sizes.items())
(packaged() / "sizes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
