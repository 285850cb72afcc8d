"The embedded weights of weights/ go into the wheel, as rtdetr_kd/embedded; everything else stands in pyproject.toml"

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithWeights(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout has them where they are
        to = Path(self.build_lib) / "rtdetr_kd" / "embedded"
        to.mkdir(parents=True, exist_ok=True)
        for p in sorted((Path(__file__).parent / "weights").iterdir()):
            shutil.copyfile(p, to / p.name)


setup(cmdclass=dict(build_py=WithWeights))
