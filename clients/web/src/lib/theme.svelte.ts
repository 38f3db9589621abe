/** Light or dark: as the system has it, until it is turned by hand. */

const KEY = "trimtab.theme";

class Theme {
  dark = $state(false);

  constructor() {
    const system = matchMedia("(prefers-color-scheme: dark)");
    const chosen = localStorage.getItem(KEY);
    this.#set(chosen === null ? system.matches : chosen === "dark");
    system.addEventListener("change", () => {
      if (localStorage.getItem(KEY) === null) {
        this.#set(system.matches);
      }
    });
  }

  turn(): void {
    localStorage.setItem(KEY, this.dark ? "light" : "dark");
    this.#set(!this.dark);
  }

  #set(dark: boolean): void {
    this.dark = dark;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  }
}

export const theme = new Theme();
