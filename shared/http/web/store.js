// The page's places in the browser (IndexedDB): the history, and this browser's requests of the host.

const NAME = "multigpu-diffusion";
const PLACES = ["requests", "jobs"]; // the first is the history's; each came with the version of its number, from 1

export class BlockedError extends Error {} // by a tab that has an older version of the page

let database = null; // a promise; it fails where the browser keeps nothing

function open() {
  database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, PLACES.length);
    request.onupgradeneeded = ({ oldVersion }) => {
      for (const place of PLACES.slice(oldVersion)) request.result.createObjectStore(place, { keyPath: "id" });
    };
    request.onsuccess = () => {
      request.result.onversionchange = () => request.result.close(); // a newer page's tab would wait for it
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new BlockedError());
  });
  return database;
}

// Records of one kind, each with an `id`.
class Place {
  constructor(name) {
    this.name = name;
  }

  async act(mode, deed) {
    const transaction = (await open()).transaction(this.name, mode);
    const request = deed(transaction.objectStore(this.name));
    return new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error ?? request.error);
    });
  }

  read(id) {
    return this.act("readonly", (records) => records.get(id));
  }

  readAll() {
    return this.act("readonly", (records) => records.getAll());
  }

  write(record) {
    return this.act("readwrite", (records) => records.put(record));
  }

  remove(id) {
    return this.act("readwrite", (records) => records.delete(id));
  }

  removeAll() {
    return this.act("readwrite", (records) => records.clear());
  }
}

export const [history, requests] = PLACES.map((name) => new Place(name));
