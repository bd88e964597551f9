"""`python -m app`: serve, as the environment says."""

import sys

from pydantic import ValidationError

from app import logs
from app.server import run
from app.settings import PREFIX, Settings, UnknownSettingError


def main() -> int:
    """Serve until told to stop; 2 when a setting is wrong."""
    try:
        settings = Settings.from_environment()
    except UnknownSettingError as error:
        return _refuse(str(error))
    except ValidationError as error:
        return _refuse(
            "; ".join(f"{PREFIX}{str(e['loc'][0]).upper()}={e['input']}: {e['msg']}" for e in error.errors())
        )
    logs.configure(settings.log_format)
    run(settings)
    return 0


def _refuse(reason: str) -> int:
    print(f"pvt-serve: {reason}", file=sys.stderr)  # noqa: T201  there is no log yet
    return 2


if __name__ == "__main__":
    sys.exit(main())
