"""The package ``dots_ocr_client`` under a second name, for programs with a module of their own of the first name.

The application chatvlmllm has a ``dots_ocr_client.py`` in its folder, which hides the installed package.
``import dots_ocr_client_installed.chatvlmllm`` finds it nevertheless, and so do the processes that draw pages. The two
names give two copies of every module: use one of them in a program.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "dots_ocr_client")]
