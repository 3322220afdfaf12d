"""Import coremltools without the noise that it makes off macOS.

On Linux its import logs a line for each native library that only macOS has, and one for each other
package whose version it has not been tested with.  None of them concerns building or reading a
package, so they are kept from the user; real errors still come through.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

from edgedistill.errors import UnavailableError


def import_coremltools(module: str = "coremltools") -> ModuleType:
    """Import coremltools, or a module inside it.

    Raises:
        UnavailableError: it is not installed.
    """
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(
            f"coremltools cannot be imported ({error})",
            hint="pip install 'edgedistill[coreml]'",
        ) from error
    finally:
        logger.setLevel(level)
