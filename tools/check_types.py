"""Run mypy over the package, naming files by where they lie in the repository."""

import subprocess
import sys

from link_package import ROOT, link_package

links = link_package()
mypy = [sys.executable, "-m", "mypy", "--package", "depthc", "--no-error-summary", *sys.argv[1:]]
result = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True)
report = result.stdout + result.stderr
for link, target in links.items():
    report = report.replace(f"{link.relative_to(ROOT)}", f"{target.relative_to(ROOT)}")
sys.stdout.write(report)
sys.exit(result.returncode)
