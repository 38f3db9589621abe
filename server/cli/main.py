"""The command and its parts."""

import typer

from server.cli import (
    activations,
    artifacts,
    audit,
    check,
    config,
    jobs,
    keys,
    library,
    measure,
    policies,
    presets,
    requirements,
    rollouts,
    switches,
)
from server.cli.backup import backup, restore
from server.cli.batch import run_batch
from server.cli.calibrate import calibrate
from server.cli.capabilities import capabilities
from server.cli.chat import chat
from server.cli.console import Commands
from server.cli.doctor import doctor, version
from server.cli.evaluate import evaluate
from server.cli.extract import extract
from server.cli.features import features
from server.cli.lens import lens
from server.cli.port import port
from server.cli.serve import serve
from server.cli.tune import tune
from server.cli.verify import verify

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Trimtab: an inference server whose requests steer the model.")
app.command()(serve)
app.command()(chat)
app.add_typer(artifacts.app, name="artifacts")
app.add_typer(presets.app, name="presets")
app.add_typer(library.app, name="library")
app.add_typer(jobs.app, name="jobs")
app.add_typer(switches.default_spec, name="default-spec")
app.add_typer(switches.kill_switch, name="kill-switch")
app.add_typer(keys.app, name="keys")
app.add_typer(policies.app, name="policies")
app.add_typer(rollouts.app, name="rollout")
app.add_typer(activations.app, name="activations")
app.add_typer(check.app, name="check")
app.add_typer(measure.app, name="measure")
app.add_typer(requirements.app, name="requirements")
app.add_typer(config.app, name="config")
app.add_typer(audit.app, name="audit")
app.command()(switches.effects)
app.command()(backup)
app.command()(restore)
app.command()(run_batch)
app.command()(extract)
app.command()(calibrate)
app.command()(evaluate)
app.command()(tune)
app.command()(port)
app.command()(lens)
app.command()(features)
app.command()(capabilities)
app.command()(verify)
app.command()(doctor)
app.command()(version)
