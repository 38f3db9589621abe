/** Where the console is: a path behind the `#`, so that the server needs to know one page only. */

export interface Place {
  room: string;
  rest: string[];
  query: URLSearchParams;
}

function read(): Place {
  const [path = "", query = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const [room = "", ...rest] = path.split("/").map(decodeURIComponent);
  return { room: room || "playground", rest, query: new URLSearchParams(query) };
}

export const place = $state<{ now: Place }>({ now: read() });

window.addEventListener("hashchange", () => {
  place.now = read();
});

export function link(room: string, ...rest: string[]): string {
  return `#/${[room, ...rest].map(encodeURIComponent).join("/")}`;
}

export function go(room: string, ...rest: string[]): void {
  location.hash = link(room, ...rest);
}

/** Change the query of the address without an entry in the history. */
export function note(query: URLSearchParams): void {
  const text = query.toString();
  const hash = `${location.hash.split("?", 1)[0] || "#/playground"}${text === "" ? "" : `?${text}`}`;
  history.replaceState(null, "", hash);
}
