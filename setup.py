"""Keep the package of the book out of wheels: it belongs to the checkout, with its notebooks and data."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildLibrary(build_py):
    """Build ``polca_lib`` alone, unless the checkout itself is installed (``pip install --editable``)."""

    def finalize_options(self) -> None:
        """Drop the book's package from the list."""
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [name for name in self.packages if name.split(".")[0] != "polca_paper"]


setup(cmdclass={"build_py": BuildLibrary})
