"""``python -m pause_ray``: the command line where the package is on the path but not installed, such as in a Ray job."""

from __future__ import annotations

from pause_ray.cli.main import main

if __name__ == "__main__":
    main()
