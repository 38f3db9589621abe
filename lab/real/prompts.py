"""Prompts of no pair: what a row is tried on (dev) and what its figures are of (test)."""

# These ask for what is sad, dull or neutral: SmolLM2 answers cheerfully to nearly everything else, and no vector could
# add to that.
GREY_DEV = ("How was the burial?", "Tell me about a broken window.", "Describe an empty street.",
            "What did the guard say?",
            "Tell me about a bad cold.", "What is it like to lose a key?", "Describe a prison cell.",
            "Tell me about the delay.", "How was the drought?", "Describe a car park.", "What happened in the fire?",
            "Tell me about a wet coat.")
GREY_TEST = ("How was the operation?", "Describe an old warehouse.", "Tell me about the cancelled flight.",
             "Describe a dusty attic.", "What did the judge say about the case?", "Tell me about the broken lift.",
             "Describe a ruined castle.", "What happened in the earthquake?", "Tell me about the tax office.",
             "How does a headache feel?", "Tell me about a long night shift.", "Tell me about the stolen bicycle.",
             "Describe a dentist's chair.", "What happened at the accident?", "Tell me about a leaking roof.",
             "Tell me about a town after the war.", "Describe a corridor.", "What happened last night?",
             "Tell me about the closed factory.", "What do you think about the noise?", "Describe a foggy harbour.",
             "What did the tired nurse say?", "Tell me about the shipwreck.", "How was the exam?")
