"""All methods that both clients have. See `endpoint` for how one description serves both."""

from trimtab_client import completions, lenses, library, work
from trimtab_client.endpoint import Endpoint, StreamEndpoint


class Endpoints:
    models = Endpoint(completions.models)
    chat = Endpoint(completions.chat)
    complete = Endpoint(completions.complete)
    stream_chat = StreamEndpoint(completions.stream_chat)
    stream_complete = StreamEndpoint(completions.stream_complete)
    lens = Endpoint(lenses.lens)

    list_artifacts = Endpoint(library.list_artifacts)
    get_artifact = Endpoint(library.get_artifact)
    artifact_versions = Endpoint(library.artifact_versions)
    create_artifact = Endpoint(library.create_artifact)
    import_artifact = Endpoint(library.import_artifact)
    download_artifact = Endpoint(library.download_artifact)
    patch_artifact = Endpoint(library.patch_artifact)
    delete_artifact = Endpoint(library.delete_artifact)
    set_alias = Endpoint(library.set_alias)
    remove_alias = Endpoint(library.remove_alias)

    list_presets = Endpoint(library.list_presets)
    get_preset = Endpoint(library.get_preset)
    preset_versions = Endpoint(library.preset_versions)
    create_preset = Endpoint(library.create_preset)
    delete_preset = Endpoint(library.delete_preset)
    set_preset_alias = Endpoint(library.set_preset_alias)
    remove_preset_alias = Endpoint(library.remove_preset_alias)

    health = Endpoint(work.health)
    capabilities = Endpoint(work.capabilities)
    extraction_methods = Endpoint(work.extraction_methods)
    start_extraction = Endpoint(work.start_extraction)
    extract = Endpoint(work.extract)
    start_calibration = Endpoint(work.start_calibration)
    calibrate = Endpoint(work.calibrate)
    calibration = Endpoint(work.calibration)
    calibration_plot = Endpoint(work.calibration_plot)
    effects = Endpoint(work.effects)
    jobs = Endpoint(work.jobs)
    get_job = Endpoint(work.get_job)
    cancel_job = Endpoint(work.cancel_job)
    wait = Endpoint(work.wait)
    default_spec = Endpoint(work.default_spec)
    set_default_spec = Endpoint(work.set_default_spec)
    clear_default_spec = Endpoint(work.clear_default_spec)
    library = Endpoint(work.library)
    collect_library = Endpoint(work.collect_library)
    kill_switch = Endpoint(work.kill_switch)
    set_kill_switch = Endpoint(work.set_kill_switch)
