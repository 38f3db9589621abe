"""What a key may do, and which role each route of the API needs."""

from typing import Literal, get_args

Role = Literal["metrics", "infer", "infer_raw", "library_read", "library_write", "jobs", "operate", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
# In words, for the documentation and the API.
MEANING: dict[Role, str] = {
    "metrics": "read metrics and effects",
    "infer": "generate, read receipts, tokenise, read with a lens or an SAE",
    "infer_raw": "steer with numbers given in the request itself, together with infer",
    "library_read": "read artifacts, presets and evaluations",
    "library_write": "create, change and delete artifacts and presets",
    "jobs": "extract, tune, calibrate and evaluate, and see and cancel jobs",
    "operate": "default spec, kill switch, roll-outs, adapters, settings to read and reload, housekeeping of the "
               "library",
    "admin": "everything, keys, policies and the audit included",
}
# Any valid key may ask these: they say what the server is and nothing of anybody's work.
ANY_KEY: Literal["any"] = "any"
# Answered without a key.
OPEN: Literal["open"] = "open"

# What quotas count.
METERED = frozenset({"create_chat_completion", "create_completion", "create_response", "create_message", "read_lens",
                     "read_features"})
# What these tell is of all tenants at once, so of other tenants only administrators are answered.
OF_ALL_TENANTS = frozenset({"show_metrics", "show_history", "follow_live", "list_alerts"})

# By the name of the route's function. A test walks all routes with every role, so none is left out.
NEEDED: dict[str, Role | Literal["any", "open"]] = {
    **dict.fromkeys(("health", "ready", "live", "page", "mark", "asset"), OPEN),
    **dict.fromkeys(("show_docs", "show_openapi", "show_version", "show_capabilities", "show_spec_schema",
                     "list_models", "show_model", "show_own_key"), ANY_KEY),
    **dict.fromkeys(("show_metrics", "list_effects", "show_history", "follow_live", "list_alerts",
                     "list_receipts"), "metrics"),
    **dict.fromkeys(("create_chat_completion", "create_completion", "create_response", "show_response",
                     "delete_response", "cancel_response", "create_message", "count_tokens", "show_receipt", "tokenize",
                     "detokenize", "refuse_embeddings", "read_lens", "read_features", "upload_file", "list_files",
                     "show_file",
                     "file_content", "delete_file", "create_batch", "list_batches", "show_batch",
                     "cancel_batch"), "infer"),
    **dict.fromkeys(("list_artifacts", "show_artifact", "list_versions", "download_artifact", "show_calibration",
                     "draw_calibration", "draw_trial", "list_presets", "show_preset", "list_preset_versions",
                     "list_evaluations", "show_evaluation", "show_evaluation_report", "draw_evaluation",
                     "list_methods"), "library_read"),
    **dict.fromkeys(("create_artifact", "import_artifact", "patch_artifact", "delete_artifact", "set_alias",
                     "remove_alias", "create_preset", "delete_preset", "set_preset_alias", "remove_preset_alias",
                     "delete_evaluation"), "library_write"),
    **dict.fromkeys(("create_extraction", "create_by_method", "create_tuning", "create_calibration",
                     "create_evaluation", "create_patch_check", "create_stack_check", "create_port",
                     "create_activations", "import_activations", "list_activations", "show_activations",
                     "activations_content", "delete_activations", "list_jobs", "show_job", "cancel_job"), "jobs"),
    **dict.fromkeys(("show_default_spec", "set_default_spec", "clear_default_spec", "show_kill_switch",
                     "set_kill_switch", "show_library", "collect_library", "load_adapter", "unload_adapter",
                     "show_settings", "reload_settings", "create_rollout", "list_rollouts", "show_rollout",
                     "publish_rollout", "promote_rollout", "return_rollout", "delete_rollout", "list_requirements",
                     "set_requirement", "delete_requirement"),
                    "operate"),
    **dict.fromkeys(("create_key", "list_keys", "show_key", "change_key", "rotate_key", "delete_key",
                     "list_audit", "verify_audit", "list_policies", "set_policy", "delete_policy"), "admin"),
}
