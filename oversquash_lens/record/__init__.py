"""A hooked model in, a Trace out; the only room that knows hook names.

The package is also the verb: `oversquash_lens.record(model, prompt)` calls `recorder.record`. Python binds a
subpackage's name on its parent at the first import, so a function beside it could not keep the name `record`.
"""

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    def __call__(self, model: Any, prompt: Any, **options: Any) -> Any:
        """See `oversquash_lens.record.recorder.record`."""
        from oversquash_lens.record.recorder import record

        return record(model, prompt, **options)


sys.modules[__name__].__class__ = _Verb
