"""Build trainbook from settings.ini, the one place of its metadata."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(here/"settings.ini", encoding="utf-8")
meta = settings["DEFAULT"]

extras = {key.removeprefix("extra_"): meta[key].split() for key in meta if key.startswith("extra_")}
extras["all"] = sorted({requirement for group in extras.values() for requirement in group})
extras["dev"] = meta["dev_requirements"].split()

setup(
    name=meta["lib_name"],
    version=meta["version"],
    description=meta["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=meta["author"],
    author_email=meta["author_email"],
    keywords=meta["keywords"].split(),
    python_requires=f">={meta['min_python']}",
    packages=find_packages(include=["trainbook", "trainbook.*"]),
    package_data={"trainbook": ["py.typed"]},
    install_requires=meta["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": meta["console_scripts"].split()},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3",
                 "Operating System :: POSIX :: Linux", "Operating System :: MacOS"],
    zip_safe=False,
)
